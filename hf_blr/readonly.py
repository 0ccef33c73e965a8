"""Tensors that are computed where they are asked for: to be read, and not written to in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: what writes to its first argument without the underscore at the end of its name
WRITERS = frozenset({"__setitem__", "__set__", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "and", "or"))})
#: what looks like a writer and changes no number
HARMLESS = frozenset({"requires_grad_"})
#: what multiplies its first argument, in place, by its second, and what divides by it
SCALERS = {"mul_": 1, "__imul__": 1, "div_": -1, "true_divide_": -1, "__itruediv__": -1}


class ReadOnly(Tensor):
    """A tensor whose memory nobody keeps: reading works as always, and writing raises RuntimeError.

    Its views are like it, other results are plain tensors. It takes part in gradients. Where it has a `scaled_by`, the
    whole of it may be multiplied or divided by a positive number in place, which is passed on to that.
    """

    scaled_by: Callable[[float], None] | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        writes = name in WRITERS or (name.endswith("_") and not name.endswith("__") and name not in HARMLESS)
        # functions of torch.nn.init hand on what they are given by name alone
        first = args[0] if args else next(iter(kwargs.values()), None)
        scaled_by = getattr(first, "scaled_by", None) if name in SCALERS and len(args) == 2 else None
        if scaled_by is not None and isinstance(args[1], (int, float)) and args[1] > 0:
            scaled_by(args[1] ** SCALERS[name])
            writes = False
        if (writes and isinstance(first, cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(
                f"{name}: this weight is multiplied out of a block low-rank layer's factors each time it is read, so "
                "that what is written to it would be lost; change the factors, or make the model dense first with "
                "hf_blr.to_dense(model)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            own = [arg for arg in args[:1] if isinstance(arg, cls)]
            if own and isinstance(out, Tensor) and shares_memory(out, own[0]):
                return out.as_subclass(cls)
            return out


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
