"""Weight (and the Gram matrix of its inputs) -> factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.factorize.finite import check_finite
from hf_blr.factorize.gram import damped, squared_error
from hf_blr.factorize.metric import OutputMetric
from hf_blr.factorize.options import FitOptions
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, BLRSpec, structure_named

__all__ = ["Factors", "FitOptions", "factorize"]


@dataclass(frozen=True)
class Factors:
    """The outcome of one fit.

    tensors: factors in the shapes of the spec, float32, and indices, int32; on the weight's device.
    rel_error: ||(W - W') X|| / ||W X|| over the calibration inputs X; Frobenius, ||W - W'|| / ||W||, without a Gram.
    rounds: alternating rounds that were run; 0 for a closed form.
    """

    tensors: dict[str, Tensor]
    rel_error: float
    rounds: int


def factorize(
    weight: Tensor,
    spec: BLRSpec,
    gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    options: FitOptions | None = None,
) -> Factors:
    """The factors of `spec` that come closest to W on the inputs that `gram` describes.

    Args:
        weight: W `[N, K]`, any float dtype; the fit runs in float32 on its device.
        spec: structure and sizes.
        gram: H = X^T X `[K, K]` of the layer's inputs X `[T, K]`, up to a factor. None weighs all inputs alike.
        output_gram: G = sum of g g^T over the gradients g of the loss by the layer's outputs, as diagonal blocks
            `[M, N/M, N/M]`, up to a factor. None weighs all outputs alike.
        options: rounds, tolerance, damping and seed.

    Raises:
        ValueError: if the shapes do not match, or the weight or the Gram holds NaN or infinity.
    """
    record, options = structure_named(spec.structure), options or FitOptions()
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise ValueError(f"the weight must be [{spec.out_features}, {spec.in_features}], got {tuple(weight.shape)}")
    if gram is not None and gram.shape[-1] != spec.in_features:
        raise ValueError(f"the Gram matrix must be [{spec.in_features}] * 2, got {tuple(gram.shape)}")
    check_finite("the weight", weight)
    scale = root_mean_square(weight)
    if scale == 0:
        return Factors(zero_tensors(spec, weight.device), 0.0, 0)
    weight = (weight.detach().double() / scale).float().contiguous()
    if gram is not None:
        gram = damped(gram.to(weight), options.damping)
        gram = gram / gram.diagonal().mean()
    metric = None
    if output_gram is not None and record.weighed:
        metric = OutputMetric(output_gram.to(weight.device), spec.num_blocks[1])
    image = weight if metric is None else metric.whiten(weight)
    tensors, losses = record.load("fit")(image, spec, gram, options)
    if metric is not None:
        tensors[record.weighed] = metric.restore(tensors[record.weighed])
    tensors = record.load("finish")(spec, tensors)
    error = relative_error(weight, implementation_of(spec.structure).dense(**tensors), gram)
    share = scale ** (1 / len(record.scaled))
    tensors = {name: (t * share if name in record.scaled else t).contiguous() for name, t in tensors.items()}
    return Factors(tensors, error, max(len(losses) - 1, 0))


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
