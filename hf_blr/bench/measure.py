"""What is measured of a whole model, generation apart: a forward, a training step, files and loading."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_blr.bench.forms import (
    WHOLE_MODES,
    forget_compiled,
    inductor_options,
    repeated_blocks,
    with_compiled_pieces,
)
from hf_blr.bench.inputs import forward_inputs, training_inputs
from hf_blr.bench.profiling import profiled
from hf_blr.bench.timing import Timer, forget_peak, peak, seconds_of

MEASUREMENTS = ("prefill", "decode", "training", "storage")
PROTOCOL = (
    "random weights; prefill: median forward, logits of the last token; decode: generate() on a static cache, masks "
    "built in the step, prompt and first steps not counted, median of three; training: forward, backward, clipping and "
    "AdamW on the projections or factors alone, the rest frozen; pictures with channels last; compiled: with dependent "
    "launches, in training the loss too; load: from files just written"
)
#: an attention function without a mask function: a mask built under graph capture would keep SDPA off its flash kernel
CAUSAL_SDPA = "hf_blr_causal_sdpa"


def prefill(
    model: nn.Module, kind: str, batch: int, tokens: int, form: str, mode: str, timer: Timer, profile: bool = False
) -> dict:
    """{"ms", "peak_bytes"} of one forward over `[batch, tokens]`; for text the logits of the last token alone.

    With `profile` also "profile", of `profiling.profiled`, in forms that replay a graph of ours on a GPU.
    """
    with forward_run(model, kind, batch, tokens, form, mode, timer) as run:
        row: dict[str, Any] = {"ms": timer.median(run) * 1e3, "peak_bytes": peak(timer.device)}
        if profile and timer.on_gpu and form in ("graph", "compiled"):
            row["profile"] = profiled(run)
        return row


@contextlib.contextmanager
def forward_run(
    model: nn.Module, kind: str, batch: int, tokens: int, form: str, mode: str, timer: Timer
) -> Iterator[Callable]:
    """What repeats one forward of `prefill`, compiled and warm; its inputs live as long as this context."""
    inputs = forward_inputs(model, kind, batch, tokens, timer.device)
    call: Callable = model
    if form == "compiled":
        call = with_compiled_pieces(model, repeated_blocks(model), mode)
    if form == "whole":
        forget_compiled()
        call = torch.compile(model, mode=WHOLE_MODES[mode], dynamic=False)
    with torch.no_grad(), maskless_attention(model, kind):
        forget_peak(timer.device)
        if form in ("graph", "compiled"):
            run = timer.captured(lambda: call(**inputs))
        else:
            run = lambda: call(**inputs)  # noqa: E731
            for _ in range(3):
                run()
        yield run


@contextlib.contextmanager
def maskless_attention(model: nn.Module, kind: str) -> Iterator[None]:
    """Within this context a transformers model attends by SDPA without a mask in memory, text causally by its flag.

    Masks that are not needed are left out, except under graph capture: there one would be built, and blocks be compiled
    once more for it, which fails.
    """
    if kind == "diffusion":
        yield
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)
    attending: Any = model
    before = attending.config._attn_implementation
    attending.set_attn_implementation(CAUSAL_SDPA)
    try:
        yield
    finally:
        attending.set_attn_implementation(before)


#: of a training step; torch.compile of a whole model with its loss takes minutes
TRAINING_FORMS = ("eager", "graph", "compiled")


def training(
    model: nn.Module,
    kind: str,
    names: list[str],
    batch: int,
    tokens: int,
    form: str,
    mode: str,
    timer: Timer,
    activation_budget: float = 1.0,
    profile: bool = False,
    rounds: int = 1,
    turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    so_far: Callable[[dict], None] = lambda row: None,
) -> dict:
    """{"ms", "peak_bytes", "trained_parameters"} of one step as the Trainer takes it: AdamW, norms clipped at one.

    "ms" is the median of the rounds' medians, which are "ms_of_rounds". Each round is timed within a `turn()` of its
    own, at whose end `so_far` is handed what the rounds until then say. With `profile` also "profile", of
    `profiling.profiled`, in forms that replay a graph of ours on a GPU, within one more turn.

    Args:
        names: the modules that train, dense or compressed.
        form: of `TRAINING_FORMS`; but for "eager" the whole step, the optimizer's part included, is one CUDA graph.
        activation_budget: share of the activations that compiled blocks keep for the backward, of those that
            torch.compile keeps by itself; the others are computed again.
    """
    import torch._functorch.config

    model.train().requires_grad_(False)
    trained = [p for name in names for p in model.get_submodule(name).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    inputs = training_inputs(model, kind, batch, tokens, timer.device)
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=timer.on_gpu, capturable=timer.on_gpu)
    call: Callable = model
    loss: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if form == "compiled":
        call, loss = with_compiled_pieces(model, repeated_blocks(model), mode), compiled_loss(model, mode)
    forget_peak(timer.device)

    def step() -> None:
        call(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    budget = torch._functorch.config.patch(activation_memory_budget=activation_budget)
    row: dict[str, Any] = {}
    with maskless_attention(model, kind), loss, budget:
        run: Callable = step
        if form == "eager":
            for _ in range(2):
                step()
        else:
            run = timer.captured(step)
        found = []
        for _ in range(rounds):
            with turn():
                found.append(timer.median(run) * 1e3)
                row = {
                    "ms": statistics.median(found),
                    "ms_of_rounds": list(found),
                    "peak_bytes": peak(timer.device),
                    "trained_parameters": sum(p.numel() for p in trained),
                }
                so_far(row)
        if profile and timer.on_gpu and form != "eager":
            with turn():
                row["profile"] = profiled(run)
    model.eval().requires_grad_(False)
    return row


@contextlib.contextmanager
def compiled_loss(model: nn.Module, mode: str) -> Iterator[None]:
    """Within this context a model's loss is compiled: logits of many words never become a tensor in float32."""
    losing: Any = model
    before = losing.loss_function
    losing.loss_function = torch.compile(before, dynamic=False, options=inductor_options(mode))
    try:
        yield
    finally:
        losing.loss_function = before


def storage(model: Any, device: torch.device) -> dict:
    """{"disk_bytes", "save_s", "load_s"}: saved into a temporary folder and loaded onto the device from there."""
    with tempfile.TemporaryDirectory() as folder:
        save_s = seconds_of(lambda: model.save_pretrained(folder), device)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        if not size:
            raise ValueError(f"{type(model).__name__}.save_pretrained wrote no safetensors files")
        dtype = next(model.parameters()).dtype

        def load() -> None:
            type(model).from_pretrained(folder, dtype=dtype, device_map={"": device})

        return {"disk_bytes": size, "save_s": save_s, "load_s": seconds_of(load, device)}
