"""BLAST's factors in bits: v, then the best s and u for it, then u, then the best s for both."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_blr.factorize.bits import ToRound
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
    s = tensors["s"].double().transpose(0, 1)  # [B1, B2, R]
    behind = torch.einsum("jir,irt,jit->jrt", s, problem.behind(tensors["u"]), s)
    codes = problem.round(tensors["v"], None if problem.gram is None else own, behind)
    v = codes.numbers(weight.dtype)
    u, s = tensors["u"] if metric is None else metric.whiten(tensors["u"]), tensors["s"]
    products = data.gram_products(v)
    cross = torch.bmm(data.wh_columns, v.mT).view(b1, b2, q, spec.rank).transpose(0, 1)
    state = State(u, s, v, products, cross, 0.0)
    for _ in range(REFITS):
        s = data.solve_s(state)
        u, loss = data.solve_u(s, products, cross)
        state = replace(state, s=s, u=u, loss=loss)
    u = state.u if metric is None else metric.restore(state.u)
    u_codes = problem.round(u, data.normal_of_u(state.s, products), problem.coupling)
    numbers = u_codes.numbers(weight.dtype)
    state = replace(state, u=numbers if metric is None else metric.whiten(numbers))
    return {"u": u_codes, "s": data.solve_s(state), "v": codes}
