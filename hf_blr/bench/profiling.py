"""Where the time of a replayed CUDA graph goes, kernel by kernel, from PyTorch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

#: {part: names of its kernels}; the first that matches counts. torch.compile turns products of one token, and those
#: that its autotuning prefers to cuBLAS, into kernels of its own, whose names say mm
PARTS = {
    "blr": r"^(blast|block_gemm|decode|pivoted|columns|swap)_\w*kernel",
    "attention": r"flash|fmha|attention|sdpa|^attend",
    "products": r"nvjet|gemm|gemv|cutlass|splitk|xmma|convolution|implicit|triton_tem|triton_\w*mm",
    "elementwise": r"",
}
#: longest kernels that a row keeps by name
KEPT = 12


def profiled(run: Callable, replays: int = 5) -> dict:
    """{"parts": {part: ms}, "kernels": [{"kernel", "part", "calls", "ms"}]} of one call of `run`, the mean of several.

    Every moment counts once: a kernel that starts early, beside the one before, from that one's end on. "idle" is what
    no kernel fills between the first and the last of a call. Source: Kineto's records of the device.

    Args:
        run: replays a CUDA graph.
        replays: calls that are recorded, after one that is not.
    """
    run()
    torch.cuda.synchronize()
    found = []
    # one recording a call, so that the pauses between calls do not count as idle
    for _ in range(replays):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        found.append(
            [
                (event.name, event.time_range.start, event.time_range.end)
                for event in profiler.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
        )
    return summed(found)


def summed(calls: list[list[tuple[str, float, float]]]) -> dict:
    """What `profiled` returns.

    Args:
        calls: of each call its kernels' (name, start, end), in microseconds.
    """
    parts = dict.fromkeys([*PARTS, "idle"], 0.0)
    kernels: dict[str, dict] = {}
    for call in calls:
        for name, seconds in exclusive(call):
            share = seconds / len(calls) / 1e3
            part = part_of(name) if name else "idle"
            parts[part] += share
            if name:
                row = kernels.setdefault(name, {"kernel": short(name), "part": part, "calls": 0.0, "ms": 0.0})
                row["calls"] += 1 / len(calls)
                row["ms"] += share
    longest = sorted(kernels.values(), key=lambda row: -row["ms"])[:KEPT]
    return {"parts": parts, "kernels": [row | {"calls": round(row["calls"], 2)} for row in longest]}


def exclusive(call: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel from the end of those before it, and ("", microseconds) of each gap."""
    found, end = [], None
    for name, start, stop in sorted(call, key=lambda kernel: kernel[1:]):
        if end is not None and start > end:
            found.append(("", start - end))
        begin = start if end is None else max(start, end)
        found.append((name, max(stop - begin, 0.0)))
        end = stop if end is None else max(end, stop)
    return found


def part_of(name: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE))


def short(name: str) -> str:
    """Without template arguments and what comes before the function."""
    name = name.removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0][:80] or name[:80]
