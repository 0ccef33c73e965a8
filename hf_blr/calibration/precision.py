"""How calibration runs compute on a GPU: fast, and without rounding that a fit would see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_blr.ops import use_impl


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Forwards of this module inside are calibration's.

    On a GPU, layers that are compressed already are multiplied out: that costs as much as a forward over as many tokens
    as their rank, and needs no kernel compiled for each of them. Products of float32 numbers are made in TF32. Nothing
    is rounded to bfloat16 that was not before: under autocast BLAST's perplexity at half the weights came out 3 %
    higher.
    """
    parameter = next(module.parameters(), None)
    with ExitStack() as stack:
        if parameter is not None and parameter.is_cuda:
            stack.enter_context(use_impl("dense"))
            stack.enter_context(Attention())
            stack.enter_context(tf32())
        yield


def tf32() -> AbstractContextManager[None]:
    """Products of float32 matrices on a GPU in TF32: 11 bits of each number, summed in float32.

    Perplexity of a model fitted so stays within 0.05 %, and the products, most of a calibration's seconds, take a
    fraction.
    """
    return float32_products("tf32")


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32 matrices on a GPU in "tf32" or "ieee", whatever the process has set."""
    matmul: Any = torch.backends.cuda.matmul
    # the older name may not be read once somebody has used the newer one
    new = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", precision) if new else ("allow_tf32", precision == "tf32")
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class Attention(TorchFunctionMode):
    """Attention in float32 gets its grouped keys and values repeated, and all attention has the same gradients twice.

    For grouped ones in float32 PyTorch has no kernel but the one that writes all attention weights to memory, which
    took more than half of a calibration run.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or len(args) < 3:
            return func(*args, **kwargs)
        query, key, value, *rest = args
        if kwargs.get("enable_gqa") and query.dtype == torch.float32:
            kwargs["enable_gqa"] = False
            key, value = (repeated(t, query.shape[-3]) for t in (key, value))
        others = [each for each in (*rest, *kwargs.values()) if torch.is_tensor(each)]
        if not torch.is_grad_enabled() or any(each.requires_grad for each in others):
            return func(query, key, value, *rest, **kwargs)
        return RepeatableAttention.apply(lambda *qkv: func(*qkv, *rest, **kwargs), query, key, value)


class RepeatableAttention(torch.autograd.Function):
    """Attention whose gradients have the same bits each time; in their backward, fast kernels sum in any order."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.attend = attend
        ctx.save_for_backward(*inputs)
        return attend(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]

        def gradients() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(ctx.attend(*inputs), inputs, gradient)

        try:
            with deterministic():
                return None, *gradients()
        except RuntimeError:
            # the form that is no single kernel sums in one order, and PyTorch asks for a setting that it does not need
            return None, *gradients()


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's algorithms inside sum in one order, or raise RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def repeated(heads: Tensor, count: int) -> Tensor:
    """`[..., heads, T, D]` -> `[..., count, T, D]`, each head for as many queries in a row."""
    return heads.repeat_interleave(count // heads.shape[-3], dim=-3)
