"""Launches that compile and do not run, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

#: of this thread's launches
only_compiles: ContextVar[bool] = ContextVar("only_compiles", default=False)


class Loading(ThreadPoolExecutor):
    """Loads what it compiles onto the device: that compiles, too, the part of a kernel that the host calls."""

    def submit(self, compiling, /, *given, **named) -> Future:
        def loaded():
            kernel = compiling(*given, **named)
            kernel.run  # noqa: B018
            return kernel

        return super().submit(loaded)


@contextmanager
def compiling(threads: int) -> Iterator[None]:
    """Within this context the kernels that this thread launches are compiled instead of run, each once.

    Outputs hold anything. At the end all are compiled; what fails is left to the launch that needs it.
    """
    launched = JITFunction.run

    def run(self, *args, warmup, **named):
        return launched(self, *args, warmup=warmup or only_compiles.get(), **named)

    device = (torch.cuda.current_device(),) if torch.cuda.is_available() else ()
    token, JITFunction.run = only_compiles.set(True), run
    try:
        with (
            Loading(threads, initializer=torch.cuda.set_device if device else None, initargs=device) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        JITFunction.run = launched
        only_compiles.reset(token)
