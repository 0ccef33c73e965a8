"""What is measured of a whole model: a forward, generation, a training step, files and loading."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from hf_blr.bench.forms import (
    WHOLE_MODES,
    StepGraph,
    forget_compiled,
    pieces_without_cache,
    repeated_blocks,
    with_compiled_pieces,
)
from hf_blr.bench.timing import Timer, seconds_of, synchronize

MEASUREMENTS = ("prefill", "decode", "training", "storage")
PROTOCOL = (
    "random weights; prefill: median forward, logits of the last token; decode: generate() on a static cache, prompt "
    "and first steps not counted; training: forward, backward, clipping and AdamW on the projections or factors "
    "alone, the rest frozen; load: from files just written"
)
#: an attention function without a mask function: a mask built under graph capture would keep SDPA off its flash kernel
CAUSAL_SDPA = "hf_blr_causal_sdpa"


def prefill(model: nn.Module, kind: str, batch: int, tokens: int, form: str, mode: str, timer: Timer) -> dict:
    """{"ms", "peak_bytes"} of one forward over `[batch, tokens]`; for text the logits of the last token alone."""
    inputs = forward_inputs(model, kind, batch, tokens, timer.device)
    call = model
    if form == "compiled":
        call = with_compiled_pieces(model, repeated_blocks(model), mode)
    if form == "whole":
        forget_compiled()
        call = torch.compile(model, mode=WHOLE_MODES[mode], dynamic=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if kind == "text":
            stack.enter_context(maskless_attention(model))
        forget_peak(timer.device)
        if form in ("graph", "compiled"):
            run = timer.captured(lambda: call(**inputs))
        else:
            run = lambda: call(**inputs)  # noqa: E731
            for _ in range(3):
                run()
        return {"ms": timer.median(run) * 1e3, "peak_bytes": peak(timer.device)}


def forward_inputs(model: nn.Module, kind: str, batch: int, tokens: int, device: torch.device) -> dict:
    """Random inputs of one forward."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = next(model.parameters()).dtype
    if kind == "text":
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device, generator=generator)
        return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    if kind == "image":
        size = model.config.image_size
        shape = (batch, model.config.num_channels, size, size)
        return {"pixel_values": torch.randn(shape, device=device, dtype=dtype, generator=generator)}
    size = model.config.sample_size
    latents = torch.randn(batch, 4, size, size, device=device, dtype=dtype, generator=generator)
    label = torch.ones(batch, device=device, dtype=torch.long)
    return {"hidden_states": latents, "timestep": label, "class_labels": label, "return_dict": False}


@contextlib.contextmanager
def maskless_attention(model: nn.Module):
    """Within this context the model attends causally by SDPA's own flag, without a mask in memory."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)
    before = model.config._attn_implementation
    model.set_attn_implementation(CAUSAL_SDPA)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def decode(model: nn.Module, batch: int, prompt: int, new_tokens: int, form: str, mode: str, device) -> dict:
    """{"tokens_per_second", "ms", "peak_bytes"} of `generate()`, over the whole batch; ms is that of one step.

    Greedy, on a `StaticCache`, after a prompt of `prompt` tokens. A first generation compiles and captures.
    """
    from transformers import CompileConfig, StaticCache

    device = torch.device(device)
    ids = forward_inputs(model, "text", batch, prompt, device)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=prompt + new_tokens)
    settings = {"do_sample": False, "disable_compile": form == "eager"}
    if form != "eager":
        settings["compile_config"] = CompileConfig(mode=WHOLE_MODES[mode], dynamic=False, fullgraph=False)
        # without it, generate() compiles on GPUs only
        settings["compile_config"]._compile_all_devices = True
    step = contextlib.nullcontext()
    if form == "whole":
        forget_compiled()
    if form == "graph":
        step = stepping_by(model, StepGraph(model.__call__, device))
    if form == "compiled":
        call = with_compiled_pieces(model.__call__, pieces_without_cache(model), mode)
        step = stepping_by(model, StepGraph(call, device))

    def generate(count, clock):
        cache.reset()
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=count,
            stopping_criteria=[clock],
            **settings,
        )

    with step:
        forget_peak(device)
        generate(min(6, new_tokens), StepClock(device))
        clock = StepClock(device)
        generate(new_tokens, clock)
        seconds = clock.seconds_per_step()
    return {"tokens_per_second": batch / seconds, "ms": seconds * 1e3, "peak_bytes": peak(device)}


@contextlib.contextmanager
def stepping_by(model: nn.Module, step: StepGraph):
    """Within this context `generate()` takes its decoding steps by `step` instead of a compiled model."""
    model.get_compiled_call = lambda compile_config=None: step
    try:
        yield
    finally:
        del model.get_compiled_call


class StepClock:
    """A stopping criterion that never stops and notes when each step was done, without waiting for the device."""

    #: the prompt's step and the first after it are not counted
    skipped = 2

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def __call__(self, input_ids, scores, **kwargs):
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds_per_step(self) -> float:
        first, last = self.marks[self.skipped - 1], self.marks[-1]
        steps = len(self.marks) - self.skipped
        if self.device.type != "cuda":
            return (last - first) / steps
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / steps


def training(model: nn.Module, kind: str, names: list[str], batch: int, tokens: int, timer: Timer) -> dict:
    """{"ms", "peak_bytes", "trained_parameters"} of one step as the Trainer takes it: AdamW, norms clipped at one.

    Args:
        names: the modules that train, dense or compressed.
    """
    model.train().requires_grad_(False)
    trained = [p for name in names for p in model.get_submodule(name).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    inputs = training_inputs(model, kind, batch, tokens, timer.device)
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=timer.on_gpu)
    forget_peak(timer.device)

    def step():
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    seconds = timer.median(step)
    model.eval().requires_grad_(False)
    return {
        "ms": seconds * 1e3,
        "peak_bytes": peak(timer.device),
        "trained_parameters": sum(p.numel() for p in trained),
    }


def training_inputs(model: nn.Module, kind: str, batch: int, tokens: int, device: torch.device) -> dict:
    """Inputs with labels. Raises NotImplementedError for diffusion models."""
    if kind == "diffusion":
        raise NotImplementedError("training steps are measured for text and image models")
    inputs = forward_inputs(model, kind, batch, tokens, device)
    if kind == "text":
        return {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"], "use_cache": False}
    return {**inputs, "labels": torch.zeros(batch, device=device, dtype=torch.long)}


def storage(model: nn.Module, device: torch.device) -> dict:
    """{"disk_bytes", "save_s", "load_s"}: saved into a temporary folder and loaded onto the device from there."""
    with tempfile.TemporaryDirectory() as folder:
        save_s = seconds_of(lambda: model.save_pretrained(folder), device)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        if not size:
            raise ValueError(f"{type(model).__name__}.save_pretrained wrote no safetensors files")
        dtype = next(model.parameters()).dtype

        def load():
            type(model).from_pretrained(folder, dtype=dtype, device_map={"": device})

        return {"disk_bytes": size, "save_s": save_s, "load_s": seconds_of(load, device)}


def forget_peak(device: torch.device):
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
    """Bytes allocated now; 0 where it is not counted."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
