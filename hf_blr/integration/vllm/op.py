"""One registered op for a layer, whatever implementation runs.

vLLM compiles a model once for all numbers of tokens and drops the guards. Which kernels run depends on that number, so
the choice is made inside the op, when it runs, and not in what is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_blr import ops
from hf_blr.ops.library import define_op
from hf_blr.structures import BLRSpec


def run(structure: str, x: Tensor, tensors: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    return ops.linear(structure, x, tensors, bias)


def fake(structure: str, x: Tensor, tensors: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


define_op(
    "served_linear(str structure, Tensor x, Tensor[] tensors, Tensor? bias, int out_features) -> Tensor", run, fake
)


def served_linear(spec: BLRSpec, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x `[..., K]` -> `[..., N]` by the tensors of a layer of these sizes; without gradients."""
    call: Any = torch.ops.hf_blr.served_linear
    return call(spec.structure, x, tensors, bias, spec.out_features)
