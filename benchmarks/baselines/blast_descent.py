"""BLAST's own compression, which knows the weights alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_blr.config import BLRConfig
from hf_blr.dense import dense_weight
from hf_blr.factorize.gram import solve_psd
from hf_blr.linear import BLRLinear
from hf_blr.plan import resolve_plan
from hf_blr.structures import Blast
from hf_blr.structures.blast.reference import blast_dense


def blast_by_gradients(dense: nn.Module, ratio: float, num_blocks, steps: int, seed: int = 0) -> nn.Module:
    """BLAST's own compression (arXiv 2410.21262): preconditioned gradient descent on each weight, no activations."""
    model = copy.deepcopy(dense)
    plan = resolve_plan(model, BLRConfig("blast", ratio=ratio, num_blocks=num_blocks))
    alike: dict[Blast, list[str]] = {}
    for name, layer in plan.items():
        alike.setdefault(layer.spec, []).append(name)
    for spec, names in alike.items():
        weights = torch.stack([dense_weight(model.get_submodule(name)).float() for name in names])
        factors = preconditioned_descent(weights, spec, steps, seed=seed)
        for i, name in enumerate(names):
            fitted = {key: value[i] for key, value in factors.items()}
            model.set_submodule(name, BLRLinear.from_fit(spec, fitted, model.get_submodule(name)))
    return model


def preconditioned_descent(weights: Tensor, spec: Blast, steps: int, delta: float = 0.1, seed: int = 0):
    """Factors {"u", "s", "v"}, each with a leading M, of weights `[M, N, K]`.

    Small random factors; u, v and s take turns, each a gradient step preconditioned by the inverse of its own Hessian
    plus `delta` times the root of the loss, with a step size that falls linearly from one to zero.
    """
    (b1, b2), (p, q), r = spec.num_blocks, spec.block_shape, spec.rank
    generator = torch.Generator().manual_seed(seed)
    m = len(weights)
    scale = weights.square().mean((1, 2), keepdim=True).sqrt()
    blocks = (weights / scale).view(m, b2, q, b1, p)
    u = 0.1 * torch.randn(m, b2, q, r, generator=generator).to(weights)
    v = 0.1 * torch.randn(m, b1, r, p, generator=generator).to(weights)
    s = torch.rand(m, b2, b1, r, generator=generator).to(weights)
    eye = torch.eye(r, device=weights.device)
    for step in range(steps):
        size = 1 - step / steps
        rows = torch.einsum("mijr,mjrp->mirjp", s, v).flatten(3)  # [M, B2, R, K]
        residual = u @ rows - blocks.flatten(3)
        shift = (delta * residual.square().mean((1, 2, 3)).sqrt())[:, None, None, None] * eye
        u = u - size * solve_psd(rows @ rows.mT + shift * rows.shape[-1] / r, (residual @ rows.mT).mT).mT
        columns = torch.einsum("mijr,miqr->mjiqr", s, u).flatten(2, 3)  # [M, B1, N, R]
        residual = columns @ v - blocks.permute(0, 3, 1, 2, 4).flatten(2, 3)
        v = v - size * solve_psd(columns.mT @ columns + shift * columns.shape[-2] / r, columns.mT @ residual)
        residual = torch.einsum("miqr,mijr,mjrp->mijqp", u, s, v) - blocks.permute(0, 1, 3, 2, 4)
        gradient = torch.einsum("miqr,mijqp,mjrp->mijr", u, residual, v)
        hessian = (u.mT @ u)[:, :, None] * (v @ v.mT)[:, None] + shift[:, :, None]
        s = s - size * solve_psd(hessian, gradient.unsqueeze(-1)).squeeze(-1)
    return {"u": u * scale[..., None], "s": s, "v": v}


def dense_of(factors: dict[str, Tensor]) -> Tensor:
    """The matrices `[M, N, K]` of batched BLAST factors."""
    return torch.stack([blast_dense(*parts) for parts in zip(factors["u"], factors["s"], factors["v"], strict=True)])
