"""Trials of factors in bits: what rounding adds to the predicted loss of each structure.

One layer of each kind is tried, and what rounding adds there is taken as the same multiple, for all layers of the kind,
of what errors of the weight's own size would lose. What a first fit leaves no chance is not tried further; see `hull`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hf_blr.compression.allocation import interpolate
from hf_blr.compression.hull import Hull, Point
from hf_blr.compression.layer_trials import Layer, factor_at, middles
from hf_blr.compression.rounding_loss import AfterFeedback, candidates, storable
from hf_blr.compression.shapes import shapes_for
from hf_blr.dense import stored_weight
from hf_blr.experts import layer_named
from hf_blr.factorize import Factors
from hf_blr.formats import PLAIN, Bits, Format
from hf_blr.structures import BLRSpec

#: ratios that trial fits keep: with the bits of the format, most layers keep one between them
TRIAL_RATIOS = 0.3, 0.75
#: what a structure may still do better: its loss by truncation at another rank or layer, over low-rank's, may be so
#: much of that of the first fit, and what rounding adds so much of the least that rounding of factors added so far
GRANTED_TRUNCATION, GRANTED_ROUNDING = 0.7, 0.5


@dataclass(frozen=True)
class Trial:
    """One structure's blocks at one ratio, fitted to one layer.

    truncation: its loss before rounding, over that of low-rank with as many parameters. rounding: {format: what
    rounding adds to the loss, over what errors of the weight's own size would}; empty of what is not tried further.
    """

    ratio: float
    truncation: float
    rounding: dict[str, float]

    @property
    def hopeless(self) -> bool:
        return not self.rounding


def trials_of(
    layers: dict[str, Layer], free: dict[str, BLRSpec], formats: tuple[Bits, ...], hopeless_too: bool = True
) -> dict[str, dict[BLRSpec, list[Trial]]]:
    """{kind of layer: {shape at rank 1: its trials, by rising ratio}}, from each middle layer.

    Unless the `hopeless_too` are tried, a shape that no budget of bits alone would take has its first fit only.
    """
    found: dict[str, dict[BLRSpec, list[Trial]]] = {}
    for kind, name in middles(layers).items():
        layer, whole = layers[name].tried(), free[name]
        curve, weight = layer.curve(), layer.weight()
        feedback = AfterFeedback.of(layer, weight.device)
        scale = feedback.loss(weight)
        dtype = stored_weight(layer_named(layer.model, name)).dtype
        rivals: list[Point] = [(PLAIN.num_bytes(whole, dtype), 0.0)]
        rivals += [(s.num_bytes(whole, dtype), feedback.of_whole(weight, s)) for s in storable(whole, formats)]
        found[kind], multiple = {}, layer.config.rank_multiple
        for shape in shapes_for(whole, layer.config):
            ranks = in_most_formats(candidates(shape, formats, multiple), formats)
            near = list(dict.fromkeys(nearest_to(kept, ranks) for kept in TRIAL_RATIOS if ranks))
            fits = {spec: layer.fit(spec) for spec in near[:1]}
            first = [trial_of(layer, spec, fits[spec], curve, scale, ()) for spec in fits]
            best = [granted(trial, found[kind].values(), formats) for trial in first]
            hull = Hull.of(rivals)
            hopeless = all(
                hull.above((storage.num_bytes(spec, dtype), loss))
                for spec, storage, loss in outcomes(shape, best, curve, scale, formats, multiple)
            )
            if hopeless and not hopeless_too:
                found[kind][shape] = first
                continue
            fits |= {spec: layer.fit(spec) for spec in near[1:]}
            trials = [trial_of(layer, spec, fitted, curve, scale, formats) for spec, fitted in fits.items()]
            options = outcomes(shape, trials, curve, scale, formats, multiple)
            rivals += [(storage.num_bytes(spec, dtype), loss) for spec, storage, loss in options]
            found[kind][shape] = trials
    return found


def granted(first: Trial, others: Iterable[list[Trial]], formats: tuple[Bits, ...]) -> Trial:
    """The best that a structure could be after its first fit, beside the trials of others."""
    added = {
        storage.name: [
            trial.rounding[storage.name] for trials in others for trial in trials if storage.name in trial.rounding
        ]
        for storage in formats
    }
    rounding = {name: GRANTED_ROUNDING * min(factors, default=0.0) for name, factors in added.items()}
    return Trial(first.ratio, GRANTED_TRUNCATION * first.truncation, rounding)


def outcomes(
    shape: BLRSpec,
    trials: list[Trial],
    curve: list[float],
    scale: float,
    formats: tuple[Bits, ...],
    multiple: int | None,
) -> Iterator[tuple[BLRSpec, Format, float]]:
    """(spec, format, predicted loss) of each rank that the shape may have, given its trials.

    curve, scale: of the layer that this is about, `loss_curve` and what errors of its weight's own size would lose.
    """
    for spec in candidates(shape, formats, multiple):
        truncation = factor_at([(trial.ratio, trial.truncation) for trial in trials], spec.ratio)
        cut = truncation * interpolate(curve, spec.equivalent_rank)
        yield spec, PLAIN, cut
        for storage in storable(spec, formats):
            measured = [(t.ratio, t.rounding[storage.name]) for t in trials if storage.name in t.rounding]
            if measured:
                yield spec, storage, cut + scale * factor_at(measured, spec.ratio)


def in_most_formats(specs: list[BLRSpec], formats: tuple[Bits, ...]) -> list[BLRSpec]:
    """Of these ranks those that most formats can store: what is tried in fewer says nothing of the others."""
    most = max((len(storable(spec, formats)) for spec in specs), default=0)
    return [spec for spec in specs if len(storable(spec, formats)) == most]


def nearest_to(ratio: float, specs: list[BLRSpec]) -> BLRSpec:
    return min(specs, key=lambda spec: abs(spec.ratio - ratio))


def trial_of(
    layer: Layer, spec: BLRSpec, fitted: Factors, curve: list[float], scale: float, formats: tuple[Bits, ...]
) -> Trial:
    """What a fit of the layer loses; all of its trials share `curve`, its `loss_curve`, and `scale`, of its weight."""
    cut = layer.loss(fitted.matrix(spec))
    low_rank = interpolate(curve, spec.equivalent_rank)
    # the refit of other factors can gain what rounding costs; a matrix of zeros loses nothing
    rounding = {
        name: max(total - cut, 1e-30) / scale if scale > 0 else 0.0
        for name, total in layer.rounded_losses(fitted, spec, storable(spec, formats)).items()
    }
    return Trial(spec.ratio, max(cut, 1e-30) / low_rank if low_rank > 0 else 1.0, rounding)
