"""Clocks: medians of CUDA-graph replays on a GPU, of plain calls on a CPU; first calls; peaks of memory."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_blr.atomic import replacing
from hf_blr.ops.rules.few_tokens import FEW_TOKENS


class Timer:
    """Times calls on one device.

    Args:
        device: "cuda" or "cpu".
        seconds: after this long no further call is timed (at least three are).
        replays: calls timed at most.
    """

    def __init__(self, device: str, seconds: float = 1.0, replays: int = 20):
        self.device, self.seconds, self.replays = torch.device(device), seconds, replays
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size if self.on_gpu else 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def larger_than_l2(self) -> torch.Tensor:
        """Four times L2 in bytes; not made before it is needed, so that it is in no other peak of memory."""
        return torch.zeros(self.l2, device=self.device)

    def __call__(self, function: Callable, weights: list, flush: bool) -> float:
        """Microseconds of one call of `function(w)`, which is called with each of `weights` in one graph."""

        def calls() -> None:
            for w in weights:
                function(w)

        return self.median(self.captured(calls), flush) * 1e6 / len(weights)

    def captured(self, function: Callable) -> Callable:
        """A CUDA graph of the call, after two calls that compile and warm up; on a CPU the function itself."""
        if not self.on_gpu:
            function()
            return function
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                function()
        graph.replay()
        return graph.replay

    def median(self, run: Callable, flush: bool = False) -> float:
        """Seconds of one call of `run`."""
        first = self.once(run, flush)
        count = max(3, min(self.replays, int(self.seconds / max(first, 1e-9))))
        if not self.on_gpu:
            return statistics.median(self.once(run, flush) for _ in range(count))
        pairs = [self.events(run, flush) for _ in range(count)]
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def once(self, run: Callable, flush: bool) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = self.events(run, flush)
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def events(self, run: Callable, flush: bool) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if flush:
            self.larger_than_l2.add_(1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end

    def copies(self, weights: list[torch.Tensor], tokens: int) -> list[list[torch.Tensor]]:
        """The weights; at few tokens, where reading them is the work, in copies of three times L2."""
        if tokens > FEW_TOKENS or not self.on_gpu:
            return [weights]
        size = sum(w.numel() * w.element_size() for w in weights)
        # at most 64, so that the smallest layers do not make the largest graphs
        count = min(64, math.ceil(3 * self.l2 / size))
        return [weights, *([w.clone() for w in weights] for _ in range(count))]


def seconds_of(function: Callable, device: torch.device) -> float:
    """Wall seconds of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: torch.device) -> None:
    synchronize(device)
    # graphs of the measurement before, in cycles
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int | None:
    """Bytes allocated at most since `forget_peak`, the model's own included; None where it is not counted."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def allocated(device: torch.device) -> int:
    """Bytes allocated now, without cuBLAS' workspaces, which come and go by themselves; 0 where it is not counted."""
    if device.type != "cuda":
        return 0
    # kept for each stream until torch.compile's CUDA graphs or somebody else drops them
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@contextlib.contextmanager
def cold_caches(keep: Path | None = None) -> Iterator[None]:
    """Within this context no kernel of ours is compiled yet, on disk or in memory.

    Args:
        keep: a Triton cache that receives what is compiled meanwhile.
    """
    for kernel in loaded_kernels():
        kernel.device_caches.clear()
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
        if keep is not None:
            copy_kernels(Path(folder), keep)


def copy_kernels(source: Path, target: Path) -> None:
    """From one Triton cache to another."""
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        if file.is_dir() or copy.exists():
            continue
        # in one step: another process may have the file loaded, and writing into a library crashes it
        with replacing(copy) as part:
            if file.name.startswith("__grp__"):
                # it lists a kernel's files by their whole paths
                part.write_text(file.read_text().replace(str(source), str(target)))
            else:
                shutil.copy2(file, part)


def loaded_kernels() -> list:
    """The Triton kernels of this package that have been imported and hold compiled code."""
    modules = [module for name, module in sys.modules.items() if name.startswith("hf_blr.ops.triton.")]
    return [value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")]
