"""Arguments of blocks: which are equal, which are kept once for all batches, which belong to one model."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from hf_blr.calibration.calls import Call


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same object or equal; objects of unknown kinds count as different."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, MutableMapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and bool(a == b)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def kept_once(new: Any, old: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """An argument with its tensors replaced by those of the first batch, where they are equal.

    Only tensors and tuples of them: what can be written to belongs to one batch.

    Args:
        seen: {id: (tensor, what was kept for it)} of this batch, as blocks share arguments.
    """
    if torch.is_tensor(new):
        if id(new) not in seen:
            seen[id(new)] = (new, old if torch.is_tensor(old) and equal(new, old) else new)
        return seen[id(new)][1]
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(kept_once(x, y, seen) for x, y in zip(new, old, strict=True))
    return new


def call_kept_once(new: Call, old: Call, seen: dict[int, tuple[Tensor, Tensor]]) -> Call:
    """A call with its arguments replaced by those of an earlier one, where they are equal."""
    kwargs = {key: kept_once(value, old.kwargs.get(key), seen) for key, value in new.kwargs.items()}
    return Call(kept_once(new.args, old.args, seen), kwargs, new.key)


def with_own_state(calls: dict[str, list[Call]]) -> dict[str, list[Call]]:
    """The same calls for a second model: dictionaries, in which blocks leave things for later ones, are copied.

    A dictionary that several blocks are handed stays one.
    """
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return value
        return copies.setdefault(id(value), copy.copy(value))

    def of(call: Call) -> Call:
        return Call(tuple(map(own, call.args)), {key: own(value) for key, value in call.kwargs.items()}, call.key)

    return {block: list(map(of, each)) for block, each in calls.items()}
