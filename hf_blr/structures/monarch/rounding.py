"""Monarch's factors in bits: v of each block pair, then the best u of each output block for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.bits import ToRound, refitted, rotation
from hf_blr.formats import Codes
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and v, for fitted u `[B2, Q, B1*R]` and v `[B1, B2*R, P]`; each pair's rank rotates by itself."""
    (b1, b2), (p, q), r = spec.num_blocks, spec.block_shape, spec.rank
    turns = rotation(r, problem.seed, tensors["v"], b1, b2)
    turned = turns @ tensors["v"].view(b1, b2, r, p)
    # of the pairs, in the blocks of v that they lie in: what else couples rows of v lies in other blocks
    pairs = problem.behind(tensors["u"]).view(b2, b1, r, b1, r).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
    pairs = turns.to(pairs) @ pairs @ turns.to(pairs).mT  # [B1, B2, R, R]
    behind = torch.stack([torch.block_diag(*block) for block in pairs])
    h = problem.input_gram.view(b1, p, b1, p)
    own = None if problem.gram is None else h.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [B1, P, P]
    v = problem.round(turned.view(b1, b2 * r, p), own, behind)
    # what u_i multiplies: v_ij in rows and columns of block j
    numbers = v.numbers(problem.weight.dtype).view(b1, b2, r, p)
    rows = torch.stack([torch.block_diag(*numbers[:, i]) for i in range(b2)])  # [B2, B1*R, K]
    u, gram = refitted(problem.weight.view(b2, q, -1), rows, problem.input_gram)
    return {"u": problem.round(u, gram, problem.coupling), "v": v}
