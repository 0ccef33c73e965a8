"""BLAST by alternating least squares in the metric of the inputs.

min over u, s, v of  sum_i || (W_i - u_i [diag(s_i1) v_1 ... diag(s_iB1) v_B1]) X ||^2

With H = X^T X the problem is quadratic in each of u, s and v while the other two stand still. The solve for u falls
apart into small ones, and is exact. Those for s and v couple all blocks, and take a few steps of conjugate gradients
from where they were: far cheaper than exact solves, and, all blocks at once, far better than block after block.
Alternation alone creeps (1 % a round); extrapolating s and v along the last step, as Nesterov does for gradients,
reaches the same error in a third of the rounds. A round that would raise the loss is repeated without the
extrapolation, so the loss never rises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from hf_blr.factorize.balance import balanced
from hf_blr.factorize.gram import conjugate_gradients, inverse_root, solve_psd
from hf_blr.factorize.options import FitOptions
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.structures.blast import Blast
from hf_blr.structures.spec import BLRSpec

#: steps by conjugate gradients. For s, eight leave the error after some rounds where exact solves would; for v, eight
#: instead of four gain less than one more round
S_STEPS, V_STEPS = 8, 4
#: of the preconditioner for v: directions that no output sees must not come out of it as rounding times a million
PRECONDITIONER_DAMPING = 1e-4
#: numbers of an intermediate of the solves for u and s: what stays in a CPU's cache, and what bounds a GPU's memory
INTERMEDIATE = {"cpu": 1 << 20, "cuda": 1 << 26}
#: spread of the starting s around 1; with all s equal every block gets the same update and BLAST stays low-rank
START_NOISE = 0.5


def fit(weight: Tensor, spec: Blast, gram: Tensor | None, options: FitOptions) -> tuple[dict[str, Tensor], list[float]]:
    """Factors of W `[N, K]` for the input Gram matrix `[K, K]`, and the squared error after each round.

    Starts from the closed low-rank solution of the same rank. Stops after the options' rounds, or when a round lowers
    the squared error by less than their tolerance.
    """
    problem = BlastProblem(weight, gram, spec)
    s, v = starting_point(weight, spec, gram, options.seed)
    state = problem.complete(s, v)
    losses = [state.loss]
    momentum, before = 0, (state.s, state.v)
    for _ in range(options.rounds):
        after = problem.alternate(state)
        t = momentum / (momentum + 3)
        candidate = problem.complete(*(a + t * (a - b) for a, b in zip(after, before, strict=True)))
        if t and candidate.loss > state.loss:
            momentum = 0
            candidate = problem.complete(*after)
        if not candidate.loss < state.loss:
            break
        gain = 1 - candidate.loss / state.loss
        state, before, momentum = candidate, after, momentum + 1
        losses.append(state.loss)
        if gain < options.tolerance:
            break
    return {"u": state.u, "s": state.s, "v": state.v}, losses


def finish(spec: BLRSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrix with s of unit mean square over the input blocks, and `balanced` u and v."""
    u, s = tensors["u"], tensors["s"]
    scale = s.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(u.dtype).tiny)  # [B2, 1, R]
    return balanced(spec, {"u": u * scale, "s": s / scale, "v": tensors["v"]})


@dataclass(frozen=True)
class State:
    """One iterate, with u the exact answer to s and v, and the products of the data that belong to v."""

    u: Tensor  # [B2, Q, R]
    s: Tensor  # [B2, B1, R]
    v: Tensor  # [B1, R, P]
    g: Tensor  # [R, B1, B1, R]
    c: Tensor  # [B2, B1, Q, R]
    loss: float


class BlastProblem:
    """The data of one fit, cut into blocks, and the exact solve for each factor."""

    def __init__(self, weight: Tensor, gram: Tensor | None, spec: Blast):
        (b1, b2), (p, q) = spec.num_blocks, spec.block_shape
        self.b1, self.b2, self.p, self.q, self.r = b1, b2, p, q, spec.rank
        if gram is None:
            gram = torch.eye(spec.in_features, dtype=weight.dtype, device=weight.device)
        image = weight @ gram
        self.energy = (image.double() * weight.double()).sum()
        self.h = gram.view(b1, p, -1)
        self.h_root = inverse_root(gram.view(b1, p, b1, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1))  # [B1, P, P]
        self.wh_columns = image.view(-1, b1, p).transpose(0, 1).contiguous()  # [B1, N, P]

    def complete(self, s: Tensor, v: Tensor) -> State:
        """The iterate with these s and v and the best u for them."""
        # the scale of a row of v, and of s_i over its input blocks, is free: fix it, so that steps can be compared
        norms = v.norm(dim=-1).clamp_min(torch.finfo(v.dtype).tiny)
        v, s = v / norms.unsqueeze(-1), s * norms
        s = s / s.norm(dim=1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        g = self.gram_products(v)
        c = torch.bmm(self.wh_columns, v.mT).view(self.b1, self.b2, self.q, self.r).transpose(0, 1)
        u, loss = self.solve_u(s, g, c)
        return State(u, s, v, g, c, loss)

    def gram_products(self, v: Tensor) -> Tensor:
        """G `[R, B1, B1, R]` with G[:, j, k] = v_j H_jk v_k^T."""
        vh = torch.bmm(v, self.h).view(self.b1, self.r, self.b1, self.p).permute(2, 0, 1, 3)  # [k, j, R, P]
        g = torch.bmm(vh.reshape(self.b1, self.b1 * self.r, self.p), v.mT)
        return g.view(self.b1, self.b1, self.r, self.r).permute(2, 1, 0, 3).contiguous()

    def alternate(self, state: State) -> tuple[Tensor, Tensor]:
        """One round: s for the state's u and v, u again, then v. Returns s and v."""
        s = self.solve_s(state)
        u, _ = self.solve_u(s, state.g, state.c)
        return s, self.solve_v(u, s, state.v)

    def solve_u(self, s: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, float]:
        """u `[B2, Q, R]` for s and the products of v, and the squared error that is left."""
        rhs = (s.unsqueeze(2) * c).sum(1).mT
        u = solve_psd(self.normal_of_u(s, g), rhs)
        # float32 sums lose the last digits of a small difference
        return u.mT, (self.energy - (u.double() * rhs.double()).sum()).item()

    def normal_of_u(self, s: Tensor, g: Tensor) -> Tensor:
        """`[B2, R, R]`: the Gram matrices of what each u_i multiplies, for s and the products of v."""
        return torch.cat([half.mul_(s).sum(2) for _, half in self.weighted(g, s)]).transpose(0, 1)

    def solve_s(self, state: State) -> Tensor:
        """s `[B2, B1, R]` for the state's u and v, close to the best."""
        uu = state.u.mT @ state.u  # [B2, R, R]
        by_rank = uu.transpose(0, 1).unsqueeze(2)  # [R, B2, 1, R]

        def normal(s: Tensor) -> Tensor:
            # (u_i^T u_i * G) s_i, without that matrix
            parts = (half.mul_(by_rank[ranks]).sum(0) for ranks, half in self.weighted(state.g, s))
            return reduce(torch.add, parts)

        rhs = (state.u.unsqueeze(1) * state.c).sum(2)
        diagonal = state.g.diagonal(dim1=1, dim2=2).diagonal(dim1=0, dim2=1) * uu.diagonal(dim1=1, dim2=2).unsqueeze(1)
        # where u or v is zero, so is the diagonal; what rounding leaves there must not be blown up
        info = torch.finfo(diagonal.dtype)
        diagonal = diagonal.maximum(info.eps * diagonal.amax((1, 2), keepdim=True) + info.tiny)
        # each output block is a system of its own
        return conjugate_gradients(normal, rhs, state.s, lambda x: x / diagonal, S_STEPS, dims=(1, 2))

    def weighted(self, g: Tensor, s: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Sums over j of s_ijr G_rjkq, part by part: (slice of the ranks r, `[ranks, B2, B1, R]` over r, i, k, q)."""
        by_rank = s.permute(2, 0, 1)
        # other accelerators have little cache and much to do at once, too
        limit = INTERMEDIATE["cpu" if s.device.type == "cpu" else "cuda"]
        size = max(1, limit // (self.b2 * self.b1 * self.r))
        for first in range(0, self.r, size):
            ranks = slice(first, first + size)
            half = torch.bmm(by_rank[ranks], g[ranks].flatten(2))
            yield ranks, half.view(-1, self.b2, self.b1, self.r)

    def solve_v(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """v `[B1, R, P]` for u and s, close to the best."""
        # u_i diag(s_ij) over all output blocks i: what multiplies v_j
        us = (u.unsqueeze(1) * s.unsqueeze(2)).transpose(0, 1).flatten(1, 2)  # [B1, N, R]
        root = inverse_root(us.mT @ us, PRECONDITIONER_DAMPING)

        def normal(v: Tensor) -> Tensor:
            approximation = torch.bmm(us, v).transpose(0, 1).flatten(1)
            return torch.bmm(us.mT, (approximation @ self.h.flatten(0, 1)).view(-1, self.b1, self.p).transpose(0, 1))

        def precondition(x: Tensor) -> Tensor:
            # exact for each block alone
            return root.mT @ (root @ x @ self.h_root.mT) @ self.h_root

        rhs = torch.bmm(us.mT, self.wh_columns)
        return conjugate_gradients(normal, rhs, v, precondition, V_STEPS, dims=(0, 1, 2))


def starting_point(weight: Tensor, spec: Blast, gram: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """s and v from the closed low-rank solution, with s spread around one."""
    b1, p = spec.num_blocks[0], spec.block_shape[0]
    _, v = low_rank_factors(weight, spec.rank, gram)
    # drawn on the CPU, so that every device starts from the same point
    noise = torch.randn(spec.sizes()["s"], generator=torch.Generator().manual_seed(seed))
    s = 1 + START_NOISE * noise.to(weight)
    return s, v.view(spec.rank, b1, p).transpose(0, 1).contiguous()
