"""Which implementation runs. The one place that asks about device, dtype, Triton and the interpreter."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_blr.ops.rules.few_tokens import FEW_TOKENS

IMPLS = ("auto", "triton", "reference", "dense")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: tensor descriptors and tuples in kernels; older releases do not compile these
OLDEST_TRITON = (3, 6)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: an entry `[impl]` of each `use_impl` that is open, in the order in which they were entered, whatever their threads
_open: list[list[str]] = []
_changing = threading.Lock()
#: what the last entry says. A plain string of the process: `torch.compile` guards it, where it cannot trace a
#: `ContextVar` and takes what a `threading.local` holds for a constant
_default = "auto"


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within this context, ops called without `impl` use this one: "auto", "triton", "reference" or "dense".

    For the whole process: of several open contexts, in whatever threads, the one entered last counts. Each takes back
    only its own entry, in any order; when all are left, it is "auto" again. To set the implementation of some layers
    apart from what other threads do, set `impl` on the modules (`BLRLinear.impl`), or pass it to the op.
    """
    entry = [check_impl(impl)]
    _change(lambda entries: [*entries, entry])
    try:
        yield
    finally:
        # by identity: another context may have asked for the same
        _change(lambda entries: [other for other in entries if other is not entry])


def _change(change: Callable[[list[list[str]]], list[list[str]]]) -> None:
    global _open, _default
    # a trace has no locks
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _changing:
        _open = change(_open)
        _default = _open[-1][0] if _open else "auto"


def current_impl() -> str:
    """What an op called without `impl` uses."""
    return _default


def resolve_impl(
    impl: str | None,
    x: Tensor,
    factors: Sequence[Tensor | None],
    *,
    indices: Sequence[Tensor] = (),
    structure: str = "",
    kernels: bool = True,
    pays: Callable[[int], bool] | None = None,
) -> str:
    """The implementation to run, "triton", "reference" or "dense".

    The rule of "auto", measured on an H100 and, in float32, on an H200: kernels wherever they can run on a GPU, except
    in float32, where tensor cores are no help, and where the structure's record says that PyTorch's own products are
    faster. "dense" multiplies the factors out and x by the result, which only pays in training with many times more
    tokens than the rank; nothing chooses it by itself.

    Args:
        impl: "auto", "triton", "reference", or None for the default.
        x: the input.
        factors: what must have x's dtype, the bias among it.
        indices: integers of any dtype.
        structure: for messages.
        kernels: whether there are any.
        pays: (tokens) -> whether the kernels are faster than PyTorch's products; None: always.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if "triton" is asked for and cannot run; it says why.
    """
    impl = current_impl() if impl is None else check_impl(impl)
    if impl in ("reference", "dense"):
        return impl
    if impl == "auto" and not (kernels and x.is_cuda and worthwhile(x, pays)):
        return "reference"
    reason = why_not_triton(x, factors, indices) if kernels else f"{structure} has no kernels"
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f'impl="triton" cannot run: {reason}; use impl="auto" or "reference"')
    return "reference"


def worthwhile(x: Tensor, pays: Callable[[int], bool] | None) -> bool:
    """Whether kernels that can run are faster than PyTorch's products."""
    if compute_dtype(x) == torch.float32:
        return False
    return pays is None or pays(x.numel() // x.shape[-1])


def few_tokens(x: Tensor) -> bool:
    """Whether x `[..., K]` has so few rows that the decode kernels run."""
    return x.numel() <= FEW_TOKENS * x.shape[-1]


def why_not_triton(x: Tensor, factors: Sequence[Tensor | None], indices: Sequence[Tensor] = ()) -> str | None:
    """None if the kernels can run on these tensors, else the reason in words."""
    if _TRITON_PROBLEM:
        return _TRITON_PROBLEM
    if x.is_cuda:
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return "the GPU is older than Ampere (compute capability 8.0)"
    elif not (_INTERPRETED and x.device.type == "cpu"):
        return f"the tensors are on {x.device.type}, not on a CUDA GPU"
    dtype = compute_dtype(x)
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of bfloat16, float16, float32"
    for t in (*factors, *indices):
        if t is not None and t.device != x.device:
            return f"the factors are on {t.device} and the input on {x.device}"
    for t in factors:
        if t is not None and t.dtype != dtype and compute_dtype(t) != dtype:
            return f"the factors have dtype {t.dtype} and the input {dtype}"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's where autocast is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_impl(impl: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    return impl


def triton_problem() -> str | None:
    """Why this installation of Triton cannot be used, found without importing it, which costs a second."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        installed = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # a build under another name
        return None
    wanted = ".".join(map(str, OLDEST_TRITON))
    too_old = tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRITON
    return f"the kernels need Triton {wanted}, {installed} is installed" if too_old else None


_TRITON_PROBLEM = triton_problem()
