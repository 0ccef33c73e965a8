"""Statistics as a caller gives them, checked before anything is fitted to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.store import StoredTensors
from hf_blr.factorize.metric import metric_blocks
from hf_blr.plan import Plan
from hf_blr.structures import is_count

#: of the largest number on the diagonal, how far a sum of x x^T may be from symmetric, by rounding
ROUNDING = 1e-3


def check_statistics(statistics: Statistics, plan: Plan) -> None:
    """Matrices that lie in files are not read for it.

    Raises:
        TypeError: if these are no statistics.
        ValueError: naming the layer, if they were collected without a planned layer or of another model, or a matrix is
            no sum of x x^T: of another shape, not of floating-point numbers, not symmetric, with a negative diagonal.
    """
    if not isinstance(statistics, Statistics):
        raise TypeError(f"statistics must be what collect_statistics returns, got {type(statistics).__name__}")
    if not is_count(statistics.tokens) or statistics.tokens < 1:
        raise ValueError(f"statistics.tokens must be a positive integer, got {statistics.tokens!r}")
    missing = [name for name in plan if name not in statistics.grams and name not in statistics.unreached]
    if missing:
        raise ValueError(
            f"statistics.grams holds no matrix for {missing[0]} ({len(missing)} of {len(plan)} are missing); "
            "collect them with this config"
        )
    for kind in ("grams", "output_grams"):
        matrices = getattr(statistics, kind)
        if isinstance(matrices, StoredTensors):
            continue
        for name in (name for name in plan if name in matrices):
            spec = plan[name].spec
            blocks = metric_blocks(spec.out_features)
            size = spec.out_features // blocks
            shape = (spec.in_features,) * 2 if kind == "grams" else (blocks, size, size)
            problem = fault_of(matrices[name], shape)
            if problem is not None:
                raise ValueError(f"statistics.{kind} of {name}: expected {problem}; collect them with this model")
    for name in (name for name in plan if name in statistics.rows):
        if not is_count(statistics.rows[name]) or statistics.rows[name] < 0:
            raise ValueError(f"statistics.rows of {name}: expected a number of rows, got {statistics.rows[name]!r}")


def fault_of(matrix: Any, shape: tuple[int, ...]) -> str | None:
    """What was expected of a matrix or a stack of them, and what came; None if it is a sum of x x^T."""
    if not isinstance(matrix, Tensor) or matrix.layout != torch.strided or matrix.is_meta:
        return f"a tensor with numbers, got {type(matrix).__name__}"
    if not matrix.is_floating_point() or matrix.element_size() < 2:
        return f"floating-point numbers, got {matrix.dtype}"
    if tuple(matrix.shape) != shape:
        return f"shape {list(shape)}, got {list(matrix.shape)}"
    numbers = matrix.detach().float()
    diagonal = numbers.diagonal(dim1=-2, dim2=-1)
    # of NaN neither is so, and fits refuse those by name
    if (diagonal < 0).any() or (numbers - numbers.mT).abs().max() > ROUNDING * diagonal.max():
        return "a sum of x x^T, got a matrix that is not symmetric or has a negative diagonal"
    return None
