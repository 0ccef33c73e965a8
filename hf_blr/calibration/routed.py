"""Experts that saw few tokens borrow from the others."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch

from hf_blr.calibration.problem import Problem


def pooled(problems: dict[str, Problem], experts: Iterable[str]) -> dict[str, Problem]:
    """The experts' problems, each with K tokens of the average expert among its own; other layers' as they are.

    From fewer tokens than features, T < K, an expert's Gram matrix says nothing of some directions, and the router may
    send it other tokens in other text. Hence H of one expert becomes H + K P / S, where P is the sum of the Gram
    matrices of all experts of a tensor, and S their tokens: with many tokens it stays itself, with none it is the
    average. Tensors none of whose experts saw a token have no problem here.

    Args:
        problems: {layer: problem}, with Gram matrices.
        experts: names `<tensor>.<expert>` of all experts that are wanted, those without a token among them.
    """
    tensors: dict[str, list[str]] = {}
    for name in experts:
        tensors.setdefault(name.rpartition(".")[0], []).append(name)
    found = dict(problems)
    for names in tensors.values():
        seen = [problem for name in names if (problem := problems.get(name)) is not None and problem.gram is not None]
        rows = sum(problem.rows for problem in seen)
        if not rows:
            continue
        total = reduce(torch.add, (problem.gram for problem in seen if problem.gram is not None))
        share = total * (len(total) / rows)
        for name in names:
            own = problems.get(name)
            if own is None or own.gram is None:
                found[name] = Problem(share, rows=len(total))
            else:
                found[name] = Problem(own.gram + share, rows=own.rows + len(total))
    return found
