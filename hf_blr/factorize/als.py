"""BLAST by alternating least squares in the metric of the inputs.

min over u, s, v of  sum_i || (W_i - u_i [diag(s_i1) v_1 ... diag(s_iB1) v_B1]) X ||^2

With H = X X^T the problem is quadratic in each of u, s and v while the other two stand still, and each is solved
exactly. The solve for u needs only small products of the data: G_jk = v_j H_jk v_k^T and C_ij = (W H)_ij v_j^T. Those
for s and v go over the input blocks, and what a block has to make up is (W - W') H with that block left out of W':
products by H cost less than products of all pairs of blocks.
Alternation alone creeps (1 % a round); extrapolating s and v along the last step, as Nesterov does for gradients,
reaches the same error in a third of the rounds. A round that would raise the loss is repeated without the
extrapolation, so the loss never rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.factorize.gram import cholesky, solve_psd
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.structures import Blast

#: unknowns of one exact solve for s. Above it the input blocks are solved in groups, one after the other: at 1300
#: unknowns that halves the time of a round and costs under 0.3 % of the error after eight
MAX_S_UNKNOWNS = 768
#: spread of the starting s around 1; with all s equal every block gets the same update and BLAST stays low-rank
START_NOISE = 0.5


def fit_blast(weight, spec: Blast, gram=None, *, rounds, tolerance, seed) -> tuple[dict[str, Tensor], list[float]]:
    """Factors of W `[N, K]` for the input Gram matrix `[K, K]`, and the squared error after each round.

    Starts from the closed low-rank solution of the same rank. Stops after `rounds`, or when a round lowers the squared
    error by less than the fraction `tolerance`.
    """
    problem = BlastProblem(weight, gram, spec)
    s, v = starting_point(weight, spec, gram, seed)
    state = problem.complete(s, v)
    losses = [state.loss]
    momentum, before = 0, (state.s, state.v)
    for _ in range(rounds):
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
        if gain < tolerance:
            break
    return {"u": state.u, "s": state.s, "v": state.v}, losses


@dataclass(frozen=True)
class State:
    """One iterate, with u the exact answer to s and v, and the products of the data that belong to v."""

    u: Tensor  # [B2, Q, R]
    s: Tensor  # [B2, B1, R]
    v: Tensor  # [B1, R, P]
    g: Tensor  # [B1, B1, R, R]
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
        self.h_root = cholesky(gram.view(b1, p, b1, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1))  # [B1, P, P]
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
        """G `[B1, B1, R, R]` with G_jk = v_j H_jk v_k^T."""
        vh = torch.bmm(v, self.h).view(self.b1, self.r, self.b1, self.p).permute(2, 0, 1, 3)  # [k, j, R, P]
        g = torch.bmm(vh.reshape(self.b1, self.b1 * self.r, self.p), v.mT)
        return g.view(self.b1, self.b1, self.r, self.r).transpose(0, 1)

    def alternate(self, state: State) -> tuple[Tensor, Tensor]:
        """One round: s for the state's u and v, u again, then v. Returns s and v."""
        s = self.solve_s(state)
        u, _ = self.solve_u(s, state.g, state.c)
        return s, self.solve_v(u, s, state.v)

    def solve_u(self, s: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, float]:
        """u `[B2, Q, R]` for s and the products of v, and the squared error that is left."""
        normal = sum(s[:, k, None, :] * torch.einsum("ijr,jrq->irq", s, g[:, k]) for k in range(self.b1))
        rhs = torch.einsum("ijr,ijqr->irq", s, c)
        u = solve_psd(normal, rhs)
        # float32 sums lose the last digits of a small difference
        return u.mT, (self.energy - (u.double() * rhs.double()).sum()).item()

    def solve_s(self, state: State) -> Tensor:
        """s `[B2, B1, R]` for the state's u and v, jointly over as many input blocks as fit one solve."""
        u, v = state.u, state.v
        uu = u.mT @ u  # [B2, R, R]
        s, approximation = state.s.clone(), self.approximation(u, state.s, v)
        size = max(1, min(self.b1, MAX_S_UNKNOWNS // self.r))
        # all output blocks at once keep a GPU busy; one by one they stay in a CPU's cache, which is three times faster
        step = self.b2 if s.is_cuda else 1
        for first in range(0, self.b1, size):
            group = slice(first, first + size)
            gram = state.g[group, group].transpose(1, 2)  # [size, R, size, R]
            count = gram.shape[0] * self.r
            missing = self.missing(approximation, group) @ v[group].mT  # [size, N, R]
            rhs = (u * missing.view(-1, self.b2, self.q, self.r)).sum(2).transpose(0, 1)  # [B2, size, R]
            for i in range(0, self.b2, step):
                rows = slice(i, i + step)
                normal = (uu[rows, None, :, None, :] * gram).reshape(-1, count, count)
                s[rows, group] = solve_psd(normal, rhs[rows].reshape(-1, count, 1)).view(-1, gram.shape[0], self.r)
            for j in range(self.b1)[group]:
                approximation[:, j] = scaled(u, s, j) @ v[j]
        return s

    def solve_v(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """v `[B1, R, P]` for u and s, block after block: each exact for the newest values of the others."""
        v, approximation = v.clone(), self.approximation(u, s, v)
        # all at once: one factorization that the host waits for
        root = cholesky(torch.stack([us.mT @ us for us in (scaled(u, s, j) for j in range(self.b1))]))
        for j in range(self.b1):
            us = scaled(u, s, j)
            half = torch.cholesky_solve(us.mT @ self.missing(approximation, slice(j, j + 1))[0], root[j])
            v[j] = torch.cholesky_solve(half.mT, self.h_root[j]).mT
            approximation[:, j] = us @ v[j]
        return v

    def approximation(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """W' as `[N, B1, P]`."""
        return torch.stack([scaled(u, s, j) @ v[j] for j in range(self.b1)], 1)

    def missing(self, approximation: Tensor, group: slice) -> Tensor:
        """Those columns of (W - W') H, with W' zero in the group: what it has to make up, `[size, N, P]`."""
        before, after = approximation[:, : group.start], approximation[:, group.stop :]
        columns = self.h[:, :, group.start * self.p : group.stop * self.p]  # [B1, P, size * P]
        put_in = before.flatten(1) @ columns[: group.start].flatten(0, 1)
        put_in += after.flatten(1) @ columns[group.stop :].flatten(0, 1)
        return self.wh_columns[group] - put_in.view(len(put_in), -1, self.p).transpose(0, 1)


def scaled(u: Tensor, s: Tensor, j: int) -> Tensor:
    """u_i diag(s_ij) over all output blocks i, `[N, R]`: what multiplies v_j."""
    return (u * s[:, j, None, :]).flatten(0, 1)


def starting_point(weight, spec: Blast, gram, seed) -> tuple[Tensor, Tensor]:
    """s and v from the closed low-rank solution, with s spread around one."""
    b1, p = spec.num_blocks[0], spec.block_shape[0]
    _, v = low_rank_factors(weight, spec.rank, gram)
    # drawn on the CPU, so that every device starts from the same point
    noise = torch.randn(spec.factor_shapes()["s"], generator=torch.Generator().manual_seed(seed))
    s = 1 + START_NOISE * noise.to(weight)
    return s, v.view(spec.rank, b1, p).transpose(0, 1).contiguous()
