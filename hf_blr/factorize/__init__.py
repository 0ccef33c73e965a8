"""Weight (and the Gram matrix of its inputs) -> factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_blr.factorize.bits import ToRound, coupling_of
from hf_blr.factorize.finite import check_finite
from hf_blr.factorize.gram import damped, squared_error
from hf_blr.factorize.metric import OutputMetric
from hf_blr.factorize.options import FitOptions
from hf_blr.formats import PLAIN, Bits, Codes, Format
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, BLRSpec, structure_named

__all__ = ["Factors", "FitOptions", "factorize"]


@dataclass(frozen=True)
class Factors:
    """The outcome of one fit.

    tensors: factors in the shapes of the spec, float32, or codes of them, and indices, int32; on the weight's device.
    rel_error: ||(W - W') X|| / ||W X|| over the calibration inputs X, of codes where there are any; Frobenius,
        ||W - W'|| / ||W||, without a Gram.
    rounds: alternating rounds that were run; 0 for a closed form.
    """

    tensors: Mapping[str, Tensor | Codes]
    rel_error: float
    rounds: int

    def matrix(self, spec: BLRSpec) -> Tensor:
        """The dense matrix `[N, K]`, float32."""
        numbers = {name: t.numbers(torch.float32) if isinstance(t, Codes) else t for name, t in self.tensors.items()}
        matrix: Tensor = implementation_of(spec.structure).dense(**numbers)
        return matrix


def factorize(
    weight: Tensor,
    spec: BLRSpec,
    gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    options: FitOptions | None = None,
    storage: Format = PLAIN,
) -> Factors:
    """The factors of `spec` that come closest to W on the inputs that `gram` describes.

    Args:
        weight: W `[N, K]`, any float dtype; the fit runs in float32 on its device.
        spec: structure and sizes.
        gram: H = X^T X `[K, K]` of the layer's inputs X `[T, K]`, up to a factor. None weighs all inputs alike.
        output_gram: G = sum of g g^T over the gradients g of the loss by the layer's outputs, as diagonal blocks
            `[M, N/M, N/M]`, up to a factor. None weighs all outputs alike. Both Grams may lie on other devices.
        options: rounds, tolerance, damping and seed.
        storage: where it keeps bits, factors come as codes.

    Raises:
        ValueError: if the shapes do not match, the weight or the Gram holds NaN or infinity, or the format cannot store
            factors of these sizes.
    """
    record, options = structure_named(spec.structure), options or FitOptions()
    if (misfit := storage.misfit(spec)) is not None:
        raise ValueError(misfit)
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise ValueError(f"the weight must be [{spec.out_features}, {spec.in_features}], got {tuple(weight.shape)}")
    if gram is not None and gram.shape[-1] != spec.in_features:
        raise ValueError(f"the Gram matrix must be [{spec.in_features}] * 2, got {tuple(gram.shape)}")
    check_finite("the weight", weight)
    scale = root_mean_square(weight)
    if scale == 0:
        return Factors(zero_tensors(spec, weight.device), 0.0, 0)
    weight = (weight.detach().double() / scale).float().contiguous()
    gram = None if gram is None else unit_gram(gram.to(weight), options.damping)
    output_gram = None if output_gram is None else output_gram.to(weight.device)
    metric = metric_of(spec, output_gram)
    image = weight if metric is None else metric.whiten(weight)
    tensors, losses = record.load("fit")(image, spec, gram, options)
    if metric is not None:
        tensors[record.weighed] = metric.restore(tensors[record.weighed])
    tensors = record.load("finish")(spec, tensors)
    error = relative_error(weight, implementation_of(spec.structure).dense(**tensors), gram)
    share = scale ** (1 / len(record.scaled))
    tensors = {name: (t * share if name in record.scaled else t).contiguous() for name, t in tensors.items()}
    fitted = Factors(tensors, error, max(len(losses) - 1, 0))
    if not isinstance(storage, Bits):
        return fitted
    coupling = coupling_of(output_gram, spec.num_blocks[1], options.damping, spec.in_features)
    return in_bits(fitted, spec, ToRound(weight * scale, gram, metric, coupling, storage, options.seed))


def in_bits(fitted: Factors, spec: BLRSpec, problem: ToRound) -> Factors:
    """The same fit with codes in the place of factors, and the error that comes of them."""
    rounded = with_codes(fitted, spec, problem)
    return replace(rounded, rel_error=relative_error(problem.weight, rounded.matrix(spec), problem.gram))


def with_codes(fitted: Factors, spec: BLRSpec, problem: ToRound) -> Factors:
    """The same fit, and its error, with codes in the place of factors.

    They are chosen as the structure's record says, or are the nearest where it says nothing.
    """
    choose = structure_named(spec.structure).load("rounding") or nearest
    return replace(fitted, tensors=choose(spec, dict(fitted.tensors), problem))


def nearest(spec: BLRSpec, tensors: Mapping[str, Any], problem: ToRound) -> dict[str, Tensor | Codes]:
    names = problem.storage.in_bits(spec)
    return {name: problem.round(tensor, None) if name in names else tensor for name, tensor in tensors.items()}


def metric_of(spec: BLRSpec, output_gram: Tensor | None) -> OutputMetric | None:
    """That of the outputs, for a structure that can be weighed by them."""
    if output_gram is None or not structure_named(spec.structure).weighed:
        return None
    return OutputMetric(output_gram, spec.num_blocks[1])


def unit_gram(gram: Tensor, damping: float) -> Tensor:
    """H `[K, K]` damped, with a mean diagonal of one."""
    gram = damped(gram, damping)
    return gram.div_(gram.diagonal().mean())


def zero_tensors(spec: BLRSpec, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a matrix of zeros: factors of zeros, indices in their first order."""
    return {
        name: torch.zeros(shape, device=device)
        if kind == FACTOR
        else torch.arange(shape[0], dtype=torch.int32, device=device)
        for name, (shape, kind) in spec.tensors().items()
    }


def root_mean_square(weight: Tensor) -> Tensor:
    """Of all numbers, in float64; of none that float32 could not square, too."""
    return weight.detach().double().square().mean().sqrt()


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """||(W - W') X|| / ||W X|| for inputs X with this Gram matrix; in the Frobenius norm without one.

    Also in the Frobenius norm where W X is zero. Of a weight of zeros: 0 if that is met, else infinity.
    """
    scale = root_mean_square(weight)
    if scale == 0:
        return float("inf") if approximation.any() else 0.0
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, approximation = ((matrix.double() / scale).to(dtype) for matrix in (weight, approximation))
    residual = weight - approximation
    whole = 0.0 if gram is None else squared_error(weight, gram)
    if gram is None or whole <= 0:
        return (residual.double().norm() / weight.double().norm()).item()
    # rounding can leave a tiny negative square
    return (max(squared_error(residual, gram), 0.0) / whole) ** 0.5
