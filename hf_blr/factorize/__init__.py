"""Weight (and the Gram matrix of its inputs) -> factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.factorize.als import fit_blast
from hf_blr.factorize.balance import balanced
from hf_blr.factorize.gram import damped
from hf_blr.factorize.metric import OutputMetric
from hf_blr.factorize.monarch import fit_monarch, squared_error
from hf_blr.factorize.pivots import pivoted
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.ops.reference import DENSE
from hf_blr.structures import BLRSpec, LowRank, Monarch, Pivoted

__all__ = ["Factors", "factorize"]


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
    *,
    rounds: int = 16,
    tolerance: float = 3e-3,
    damping: float = 1e-4,
    seed: int = 0,
) -> Factors:
    """The factors of `spec` that come closest to W on the inputs that `gram` describes.

    Args:
        weight: W `[N, K]`, any float dtype; the fit runs in float32 on its device.
        spec: structure and sizes.
        gram: H = X X^T `[K, K]` of the layer's inputs, up to a factor. None weighs all inputs alike.
        output_gram: G = sum of g g^T over the gradients g of the loss by the layer's outputs, as diagonal blocks
            `[M, N/M, N/M]`, up to a factor. None weighs all outputs alike.
        rounds, tolerance, damping, seed: as in `BLRConfig`.

    Raises:
        ValueError: if the shapes do not match, or the weight or the Gram holds NaN or infinity.
    """
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise ValueError(f"the weight must be [{spec.out_features}, {spec.in_features}], got {tuple(weight.shape)}")
    if gram is not None and gram.shape[-1] != spec.in_features:
        raise ValueError(f"the Gram matrix must be [{spec.in_features}] * 2, got {tuple(gram.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    weight = weight.detach().float().contiguous()
    scale = weight.square().mean().sqrt()
    if scale == 0:
        zeros = {name: weight.new_zeros(shape) for name, shape in spec.factor_shapes().items()}
        for name, (size,) in spec.index_shapes().items():
            zeros[name] = torch.arange(size, dtype=torch.int32, device=weight.device)
        return Factors(zeros, 0.0, 0)
    weight = weight / scale
    if gram is not None:
        gram = damped(gram.to(weight), damping)
        gram = gram / gram.diagonal().mean()
    metric = None if output_gram is None else OutputMetric(output_gram.to(weight.device), spec.num_blocks[1])
    image = weight if metric is None else metric.whiten(weight)
    if isinstance(spec, (LowRank, Pivoted)):
        tensors, losses = dict(zip(("u", "v"), low_rank_factors(image, spec.rank, gram), strict=True)), []
    elif isinstance(spec, Monarch):
        tensors, losses = fit_monarch(image, spec, gram, rounds=rounds, tolerance=tolerance)
    else:
        tensors, losses = fit_blast(image, spec, gram, rounds=rounds, tolerance=tolerance, seed=seed)
    if metric is not None:
        tensors["u"] = metric.restore(tensors["u"])
    tensors = pivoted(**tensors) if isinstance(spec, Pivoted) else balanced(spec, tensors)
    error = relative_error(weight, DENSE[spec.structure](**tensors), gram)
    share = {"u": scale} if isinstance(spec, Pivoted) else dict.fromkeys(("u", "v"), scale.sqrt())
    tensors = {name: (t * share[name] if name in share else t).contiguous() for name, t in tensors.items()}
    return Factors(tensors, error, max(len(losses) - 1, 0))


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """||(W - W') X|| / ||W X|| for gram = X X^T; in the Frobenius norm without one."""
    residual = weight - approximation
    if gram is None:
        return (residual.double().norm() / weight.double().norm()).item()
    # rounding can leave a tiny negative square
    return (max(squared_error(residual, gram), 0.0) / squared_error(weight, gram)) ** 0.5
