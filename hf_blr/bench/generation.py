"""Generation: `generate()` itself or with its steps replayed, and a clock that does not hold it up."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from hf_blr.bench.forms import (
    WHOLE_MODES,
    forget_compiled,
    pieces_without_cache,
    with_compiled_pieces,
)
from hf_blr.bench.inputs import forward_inputs
from hf_blr.bench.one_block import why_not_one_block, with_one_block
from hf_blr.bench.profiling import profiled
from hf_blr.bench.timing import Timer, forget_peak, peak
from hf_blr.inference.replayed import StepGraph, stepping_by

#: generations, of which the median counts: the host's part of a step varies
ROUNDS = 3


def decode(
    model: Any,
    batch: int,
    prompt: int,
    new_tokens: int,
    form: str,
    mode: str,
    device: torch.device | str,
    profile: bool = False,
    rounds: int = ROUNDS,
    turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    so_far: Callable[[dict], None] = lambda row: None,
) -> dict:
    """{"tokens_per_second", "ms", "peak_bytes", "attention"} of `generate()` over the whole batch; ms of one step.

    Greedy, on a `StaticCache`, after a prompt of `prompt` tokens. A first generation compiles and captures, of one more
    in each of `rounds` the median counts. Where a graph of ours is replayed, "graph_ms" is what the device takes for
    it, the median of the rounds' medians, which are "graph_ms_of_rounds"; the rest of ms is `generate()`'s own. In the
    form compiled, "pieces" says what was: one block for all layers, or norms and MLPs and why no more. With `profile`
    also "profile" of that graph, of `profiling.profiled`, on a GPU. "attention" is the function that the model attends
    by, in transformers' name. Each round is timed within a `turn()` of its own, at whose end `so_far` is handed what
    the rounds until then say, and the profile within one more.
    """
    from transformers import CompileConfig, StaticCache

    device = torch.device(device)
    ids = forward_inputs(model, "text", batch, prompt, device)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=prompt + new_tokens)
    settings: dict[str, Any] = {"do_sample": False, "disable_compile": form == "eager"}
    if form != "eager":
        settings["compile_config"] = CompileConfig(mode=WHOLE_MODES[mode], dynamic=False, fullgraph=False)
        # without it, generate() compiles on GPUs only
        settings["compile_config"]._compile_all_devices = True
    if form == "whole":
        forget_compiled()
    graph = None
    if form == "graph":
        graph = StepGraph(model.__call__, device)
    pieces = {}
    if form == "compiled":
        reason = why_not_one_block(model, cache)
        if reason is None:
            pieces["pieces"], step = "one block", with_one_block(model, mode)
        else:
            pieces["pieces"] = f"norms and MLPs: {reason}"
            step = with_compiled_pieces(model.__call__, pieces_without_cache(model), mode)
        graph = StepGraph(step, device)

    def generate(count: int, clock: StepClock) -> Any:
        cache.reset()
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=count,
            stopping_criteria=[clock],
            **settings,
        )

    with stepping_by(model, graph) if graph else contextlib.nullcontext():
        forget_peak(device)
        generate(min(6, new_tokens), StepClock(device))
        seconds, replays = [], []
        timer = Timer(device.type, replays=min(20, new_tokens - 3))
        for _ in range(rounds):
            with turn():
                clock = StepClock(device)
                generate(new_tokens, clock)
                seconds.append(clock.seconds_per_step())
                if graph and graph.replay:
                    # its steps write on from where the cache stands
                    cache.reset()
                    replays.append(timer.median(graph.replay) * 1e3)
                step_seconds = statistics.median(seconds)
                row: dict[str, Any] = {
                    "tokens_per_second": batch / step_seconds,
                    "ms": step_seconds * 1e3,
                    "peak_bytes": peak(device),
                    **pieces,
                    "attention": model.config._attn_implementation,
                }
                if replays:
                    row |= {"graph_ms": statistics.median(replays), "graph_ms_of_rounds": list(replays)}
                so_far(row)
    if graph and graph.replay and profile and device.type == "cuda":
        with turn():
            cache.reset()
            row["profile"] = profiled(graph.replay)
    return row


class StepClock:
    """A stopping criterion that never stops and notes when each step was done, without waiting for the device."""

    #: the prompt's step and the first after it are not counted
    skipped = 2

    def __init__(self, device: torch.device):
        self.device = device
        #: events on a GPU, seconds elsewhere
        self.marks: list[Any] = []
        self.never: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        if self.never is None:
            self.never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self.never

    def seconds_per_step(self) -> float:
        first, last = self.marks[self.skipped - 1], self.marks[-1]
        steps = len(self.marks) - self.skipped
        if self.device.type != "cuda":
            return (last - first) / steps
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / steps
