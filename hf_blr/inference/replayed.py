"""Decoding steps of `generate()` replayed from a CUDA graph: where little is computed, launches are what takes time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map


@contextlib.contextmanager
def stepping_by(model: Any, step: Callable) -> Iterator[None]:
    """Within this context `generate()` takes its decoding steps by `step` instead of a compiled model.

    The step builds its own mask, as it does on other caches, instead of being handed one: models may have a method that
    says so.
    """
    model.get_compiled_call = lambda compile_config=None: step
    # nothing is compiled, so that a quantizer that cannot be has no say
    model._valid_auto_compile_criteria = lambda *inputs: True
    model.create_masks_for_generate = mask_for_step
    try:
        yield
    finally:
        del model.get_compiled_call, model._valid_auto_compile_criteria, model.create_masks_for_generate


def can_replay(model: Any) -> bool:
    """Whether steps of `generate()` on a static cache can be one graph: all of the model is on one NVIDIA GPU, its
    forward asks the host nothing, and each of its layers attends to all tokens.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    places = {parameter.device for parameter in model.parameters()}
    return (
        torch.version.hip is None
        and {place.type for place in places} == {"cuda"}
        and len(places) == 1
        and bool(getattr(model, "_can_compile_fullgraph", False))
        and set(kinds) == {"full_attention"}
    )


@contextlib.contextmanager
def replayed_steps(model: Any, length: int) -> Iterator[dict[str, Any]]:
    """Within this context `generate()` replays its steps; yields what to hand it besides, for texts of this length."""
    from transformers import StaticCache

    with stepping_by(model, StepGraph(model.__call__, model.device)):
        yield {"past_key_values": StaticCache(config=model.config, max_cache_len=length)}


def mask_for_step(attention_mask: torch.Tensor | None, **others: Any) -> torch.Tensor | None:
    """The mask `[batch, tokens seen]` that a step makes the rest of, at the cache's length where one token is new."""
    # transformers 5.0 has another name for them
    embeds: Any = others.get("inputs_embeds", others.get("input_embeds"))
    if attention_mask is None or embeds.shape[1] > 1:
        return attention_mask
    length = max(layer.max_cache_len for layer in cache_of(others).layers)
    return F.pad(attention_mask, (0, length - attention_mask.shape[1]))


class StepGraph:
    """One decoding step of a model as a CUDA graph: inputs are copied in, and the graph is replayed.

    The first call runs as it is and warms up, the second captures. Cache objects are captured by address: a
    `StaticCache` may be reset between two texts, not replaced. On a CPU the step itself runs, on the copied inputs.
    """

    def __init__(self, call: Callable, device: torch.device):
        self.call, self.device = call, device
        self.warm, self.cache = False, None
        self.inputs: dict[str, Any] | None = None
        self.replay: Callable[[], Any] | None = None

    def __call__(self, **inputs: Any) -> Any:
        cache = cache_of(inputs)
        if not self.warm or cache is not self.cache:
            self.warm, self.cache, self.inputs = True, cache, None
            return self.call(**inputs)
        if self.inputs is None or self.replay is None:
            self.inputs = {name: copied(value) for name, value in inputs.items()}
            self.replay = self.capture(self.inputs)
        for name, value in inputs.items():
            copy_into(self.inputs[name], value)
        return self.replay()

    def capture(self, inputs: dict[str, Any]) -> Callable[[], Any]:
        if self.device.type != "cuda":
            return lambda: self.call(**inputs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # what other threads do meanwhile is none of its business
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self.call(**inputs)

        def replay() -> Any:
            graph.replay()
            return out

        return replay


def cache_of(inputs: dict[str, Any]) -> Any:
    """The cache among a model's inputs; transformers 5.17 and 5.23 have two names for it."""
    return inputs.get("cache", inputs.get("past_key_values"))


def copied(value: Any) -> Any:
    """Tensors cloned, also inside a dict of them; everything else as it is."""
    if isinstance(value, (torch.Tensor, dict)):
        return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, value)
    return value


def copy_into(target: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        target.copy_(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            copy_into(target[key], entry)
