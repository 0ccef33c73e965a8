"""What the loss feels of each layer: Fisher information of its outputs, beside the Gram matrices of its inputs.

To second order, replacing W by W' raises the model's loss (its KL divergence from itself) by half the mean of
(g^T (W - W') x)^2 over tokens, with x the layer's input and g the gradient of the loss by its output, labels drawn from
the model's own predictions. (A model that predicts no classes has the energy of its features in the loss's place; see
`calibration/losses.py`.) With x and g taken as independent, as K-FAC does (arXiv 1503.05671), and tokens too, that
is tr(G (W - W') H (W - W')^T) / (2 S T) for G = sum g g^T and H = sum x x^T over the S inputs of the layer, and T
predictions: one ruler for all layers. S is T in a language model; an image tower reads patches, a classifier predicts
once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_blr.calibration.backwards import Backwards
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.grams import Grams
from hf_blr.calibration.losses import NoLoss, sampled_loss
from hf_blr.calibration.outputs import frozen, watching
from hf_blr.calibration.pieces import in_pieces, joined, put_away, recomputed
from hf_blr.calibration.precision import tf32
from hf_blr.calibration.sequences import parts_of, sequences_in
from hf_blr.calibration.store import Store, is_zero
from hf_blr.calibration.streams import Padding
from hf_blr.calibration.summed import summed_statistics
from hf_blr.modes import evaluating
from hf_blr.processes import ALONE, Processes


@dataclass(frozen=True)
class Statistics:
    """What one pass over the calibration text says about the dense model's layers.

    Of a tensor of experts they are those of all its experts together.

    grams: {layer: H = X^T X `[K, K]`}, float32; layers with one input share one tensor. They may lie in files, which
        are read each time.
    output_grams: {layer: diagonal blocks of G `[M, N/M, N/M]`}, float32; empty if no gradients were asked for.
    tokens: T, the predictions whose losses were summed.
    unreached: layers that no input reached, and that have no matrices: a vision tower when all that runs is text.
    rows: {layer: S, its inputs that were summed}; of experts, also those that each saw, under `<layer>.<expert>`.
    known: what was found out from these matrices and is asked for again when the next config is fitted to them.
    """

    grams: Mapping[str, Tensor]
    output_grams: Mapping[str, Tensor]
    tokens: int
    unreached: frozenset[str] = frozenset()
    rows: dict[str, int] = field(default_factory=dict)
    known: dict[Hashable, list[float]] = field(default_factory=dict, repr=False, compare=False)

    def pairs(self, name: str) -> int:
        """S T, over which tr(G D H D^T) / 2 is the loss of one prediction."""
        return self.rows_of(name) * self.tokens

    def rows_of(self, name: str) -> int:
        """S, or T where nothing else was said."""
        return self.rows.get(name, self.tokens)

    def felt(self, name: str) -> bool:
        """Whether the loss felt the layer at all: an input that is not zero reached it, and a gradient came back."""
        return all(name in grams and not is_zero(grams, name) for grams in (self.grams, self.output_grams))


def fisher_statistics(
    model: nn.Module,
    names: list[str],
    batches: list[Batch],
    seed: int = 0,
    labels: dict[str, str] | None = None,
    store: Store | None = None,
    processes: Processes = ALONE,
) -> Statistics:
    """Both kinds of matrices, from one forward and one backward a sequence.

    Where the store has a limit, each part of the layers whose matrices are within it gets such a pass of its own, and
    its matrices go into files. Blocks then run again in the backward, instead of keeping their activations. The numbers
    are the same.

    Args:
        model: in any dtype, with any outputs. Where those hold no `logits` `[..., classes]` of several classes, G is
            the Gauss-Newton matrix of half the squared error of its features. Its parameters get no gradient.
        names: dense linear layers.
        batches: keyword arguments of the model's forward, on its device; positions that `attention_mask` hides are
            not counted, neither in the matrices nor in the loss.
        seed: of what is drawn for the first sequence; the next one has the next number, whatever batch it is in.
        labels: {layer: the name under which its matrices are summed}, of layers that are counted together.
        store: where the matrices are kept.
        processes: each runs its share of the batches, which all of them hold; each gets the sums.

    Raises:
        NoLoss: if the model puts out no numbers, or none that depends on any of the layers.
    """
    store, labels = store or Store(), labels or {}
    share = processes.share(len(batches))
    seed += sum(sequences_in(batch) for batch in batches[: share.start])
    found: list[Statistics] = []
    felt = False
    for part in parts_of_statistics(model, names, batches[share], seed, labels, store, processes):
        part = summed_statistics(part, processes)
        # stops at the first that is not zero
        felt = felt or any(gram.any() for gram in part.output_grams.values())
        found.append(part if store.limit is None else put_away(part, store))
        # or it would stay beside the next one
        del part
    if not felt:
        raise NoLoss(
            f"no gradient reaches the layers of {type(model).__name__}, so nothing weighs them; set fisher=False and "
            'allocation="uniform"'
        )
    return found[0] if len(found) == 1 else joined(found)


def parts_of_statistics(
    model: nn.Module,
    names: list[str],
    batches: list[Batch],
    seed: int,
    labels: dict[str, str],
    store: Store,
    processes: Processes,
) -> Iterator[Statistics]:
    """Those of some layers after the other: all at once without a limit, else block by block, or in passes."""
    if store.limit is not None:
        parts = list(parts_of(batches, model))
        with evaluating(model):
            backwards = Backwards.of(model, names, parts, store)
            if all(processes.gathered(backwards is not None)):
                assert backwards is not None
                for piece, grams, output_grams, tokens in backwards.matrices(parts, seed, labels):
                    yield statistics_from(grams, output_grams, piece, labels, tokens)
                return
    for piece in in_pieces(model, names, labels, store.limit, output_grams=True):
        yield statistics_of_piece(model, piece, batches, seed, labels, recompute=store.limit is not None)


def statistics_from(
    grams: Grams, output_grams: dict[str, Tensor], names: list[str], labels: dict[str, str], tokens: int
) -> Statistics:
    unreached = {labels.get(name, name) for name in names} - set(grams)
    return Statistics(grams, output_grams, tokens, frozenset(unreached), grams.rows)


def statistics_of_piece(
    model: nn.Module, names: list[str], batches: list[Batch], seed: int, labels: dict[str, str], recompute: bool
) -> Statistics:
    """Those of some layers; arguments as of `fisher_statistics`.

    Args:
        recompute: keep what enters a block, and run the block again in the backward.
    """
    output_grams: dict[str, Tensor] = {}
    tokens = sequences = 0
    padding = Padding(model, names, batches)
    again = recomputed(model, names) if recompute else nullcontext()
    with (
        frozen(model),
        evaluating(model),
        watching(model, names, labels, output_grams) as collector,
        again,
        torch.enable_grad(),
    ):
        for batch in parts_of(batches, model):
            collector.real = padding.masks(batch)
            loss, count = sampled_loss(model, batch, seed + sequences)
            tokens += count
            sequences += sequences_in(batch)
            if loss.requires_grad:
                collector.paused = True
                with tf32():
                    loss.backward()
                collector.paused = False
    return statistics_from(collector.grams, output_grams, names, labels, tokens)
