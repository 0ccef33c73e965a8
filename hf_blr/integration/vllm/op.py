"""One registered op for a layer, whatever implementation runs.

vLLM compiles a model once for all numbers of tokens and drops the guards. Which kernels run depends on that number, so
the choice is made inside the op, when it runs, and not in what is traced. What is traced holds codes and scales, and no
factor that was made of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_blr import ops
from hf_blr.formats import Bits, Format, format_named
from hf_blr.ops.library import define_op
from hf_blr.ops.rules.bits import NUMBERS
from hf_blr.structures import FACTOR, BLRSpec, spec_from_dict


def described(spec: BLRSpec, storage: Format) -> str:
    """A layer's sizes and format in one string, which an op can be handed."""
    return json.dumps({**spec.to_dict(), "format": storage.name, **storage.settings})


@cache
def read(layer: str) -> tuple[BLRSpec, Format]:
    """The inverse of `described`."""
    data = json.loads(layer)
    storage = format_named(data.pop("format"), data.pop("group_size", None))
    return spec_from_dict(data), storage


def run(layer: str, x: Tensor, stored: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    spec, storage = read(layer)
    tensors = dict(zip(storage.stored(spec), stored, strict=True))
    if isinstance(storage, Bits):
        shapes = storage.in_bits(spec)
        parts = {n: {leaf: tensors[f"{n}.{leaf}"] for leaf in storage.parts(s)} for n, s in shapes.items()}
        plain = [tensors[name] for name in spec.names(FACTOR) if name not in parts]
        found = ops.route_in_bits(spec, storage.form, x, [*plain, bias])
        if found != NUMBERS:
            held = [storage.held(parts[n], shapes[n]) if n in parts else tensors[n] for n in spec.names()]
            return ops.linear_in_bits(found, spec.structure, x, held, bias)
        tensors |= {name: storage.numbers(parts[name], shape, x.dtype) for name, shape in shapes.items()}
    return ops.linear(spec.structure, x, [tensors[name] for name in spec.names()], bias)


def fake(layer: str, x: Tensor, stored: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


define_op("served_linear(str layer, Tensor x, Tensor[] stored, Tensor? bias, int out_features) -> Tensor", run, fake)


def served_linear(layer: str, x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """x `[..., K]` -> `[..., N]` by a layer of these sizes and this format; without gradients.

    Args:
        layer: of `described`.
        x: the input.
        stored: what the format keeps for the layer (`Format.stored`), in its order.
        bias: `[N]`, or none.
        out_features: N.
    """
    call: Any = torch.ops.hf_blr.served_linear
    return call(layer, x, stored, bias, out_features)
