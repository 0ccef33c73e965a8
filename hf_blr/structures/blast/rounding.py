"""BLAST's factors in bits: v, then the best s and u for it, then u, then the best s for both, and all of it again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_blr.factorize.bits import ROUNDS, ToRound
from hf_blr.formats import Codes
from hf_blr.structures.blast import Blast
from hf_blr.structures.blast.fit import BlastProblem, State

#: solves for s and u in turn, for the rounded v
REFITS = 4


def rounded(spec: Blast, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and v, and s as numbers, for fitted u `[B2, Q, R]`, s `[B2, B1, R]` and v `[B1, R, P]`.

    Blocks share the rank, so that nothing can rotate. s stands between outputs that the metric couples; u does not.
    """
    (b1, b2), (p, q) = spec.num_blocks, spec.block_shape
    metric = problem.metric
    gram, weight = problem.input_gram, problem.weight
    data = BlastProblem(weight if metric is None else metric.whiten(weight), gram, spec)
    own = gram.view(b1, p, b1, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [B1, P, P]
    u, s, v = tensors["u"], tensors["s"], tensors["v"]
    for _ in range(ROUNDS):
        wide = s.double().transpose(0, 1)  # [B1, B2, R]
        behind = torch.einsum("jir,irt,jit->jrt", wide, problem.behind(u), wide)
        v_codes = problem.round(v, None if problem.gram is None else own, behind)
        v = v_codes.numbers(weight.dtype)
        products = data.gram_products(v)
        cross = torch.bmm(data.wh_columns, v.mT).view(b1, b2, q, spec.rank).transpose(0, 1)
        state = State(u if metric is None else metric.whiten(u), s, v, products, cross, 0.0)
        for _ in range(REFITS):
            s = data.solve_s(state)
            u, loss = data.solve_u(s, products, cross)
            state = replace(state, s=s, u=u, loss=loss)
        u = state.u if metric is None else metric.restore(state.u)
        u_codes = problem.round(u, data.normal_of_u(state.s, products), problem.coupling)
        u = u_codes.numbers(weight.dtype)
        state = replace(state, u=u if metric is None else metric.whiten(u))
        s = data.solve_s(state)
        v = data.solve_v(state.u, s, v)
    return {"u": u_codes, "s": s, "v": v_codes}
