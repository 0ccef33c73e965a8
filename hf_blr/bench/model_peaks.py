"""Predictions of a device's peaks for the rows of `bench model`, and how far they are off."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_blr.bench.forms import repeated_blocks
from hf_blr.bench.models import shape_of
from hf_blr.bench.variants import Variant, build_model
from hf_blr.dense import feature_sizes, is_dense_linear
from hf_blr.formats import FORMATS, PLAIN
from hf_blr.inference import attention
from hf_blr.inference.fusion import TOGETHER
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.roofline.devices import Peaks
from hf_blr.roofline.whole_models import (
    ModelSizes,
    Projection,
    forward_parts,
    forward_seconds,
    step_parts,
    step_seconds,
)
from hf_blr.structures import LowRank

#: without the host between their kernels, so that peaks have a say
PREDICTED_FORMS = ("compiled",)


def model_predictions(rows: list[dict], device: Peaks) -> list[dict]:
    """The rows of `bench model` with a prefill or a decoding step of a text or image model in the compiled form.

    Returns:
        Those rows with `measured_ms` (decoding: the graph's own time, `graph_ms`), `predicted_ms` and `deviation`
        (predicted / measured - 1).
    """
    found = []
    for row in rows:
        measured = row.get("graph_ms" if row["measurement"] == "decode" else "ms")
        shape = shape_of(row["model"])
        if measured is None or shape is None or shape.kind == "diffusion" or row.get("form") not in PREDICTED_FORMS:
            continue
        if not is_counted(row, device):
            continue
        sizes = sizes_of_row(row)
        if row["measurement"] == "prefill":
            seconds = forward_seconds(sizes, row["batch"], row["tokens"], device)
        elif row["measurement"] == "decode":
            one_block = row.get("pieces") == "one block"
            seconds = step_seconds(sizes, row["batch"], row["prompt"] + row["new_tokens"], device, one_block)
        else:
            continue
        times = {"measured_ms": measured, "predicted_ms": seconds * 1e3, "deviation": seconds * 1e3 / measured - 1}
        found.append({**row, **times})
    return found


def is_counted(row: dict, device: Peaks) -> bool:
    """Whether the kernels of a row's layers are: those of numbers, and of fp8 at many tokens; never a rival's."""
    if row.get("rival"):
        return False
    storage = Variant.parse(row["variant"]).storage
    float8 = storage == "fp8" and row["measurement"] == "prefill" and device.float8_flops is not None
    return storage == PLAIN.name or float8


def predicted_parts(row: dict, device: Peaks) -> dict[str, float]:
    """Milliseconds of each part of a row's forward or decoding step, {part: ms}.

    {} for diffusion models, for models whose shape is not known, and for layers whose kernels are not counted.
    """
    shape = shape_of(row["model"])
    if shape is None or shape.kind == "diffusion" or not is_counted(row, device):
        return {}
    sizes = sizes_of_row(row)
    if row["measurement"] == "decode":
        parts = step_parts(sizes, row["batch"], row["prompt"] + row["new_tokens"], device)
    else:
        parts = forward_parts(sizes, row["batch"], row["tokens"], device)
    parts["projections"] += parts.pop("once")
    return {part: 1e3 * seconds for part, seconds in parts.items()}


def sizes_of_row(row: dict) -> ModelSizes:
    """The sizes behind a row, of the attention that it names; rows of before there was a choice name none."""
    sizes = model_sizes_of(row["model"], row["variant"], row.get("ratio", 0.5))
    return replace(sizes, own_attention=row.get("attention") == attention.NAME)


@functools.lru_cache
def model_sizes_of(name: str, variant: str, ratio: float) -> ModelSizes:
    """Those of a variant, of the model built without memory."""
    shape, parsed = shape_of(name), Variant.parse(variant)
    assert shape is not None
    return sizes_of(build_model(shape, parsed, ratio, "meta", torch.bfloat16), parsed.fused)


def sizes_of(model: Any, fused: bool) -> ModelSizes:
    """What a text or image model of transformers consists of; if fused, with what `hf_blr.fuse` does for it."""
    blocks, config = repeated_blocks(model), model.config
    groups = projection_groups(blocks[0], fused)
    last = groups[-1][-1].spec
    activations = [p.spec.out_features for group in groups for p in group].count(last.in_features)
    if fused and activations == 1:
        groups = tuple(tuple(activating(p, last.in_features) for p in group) for group in groups)
    heads = config.num_attention_heads
    norms = [m for m in blocks[0].modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
    image = model.main_input_name == "pixel_values"
    head = (model.classifier if image else model.lm_head).weight.shape
    patches = (config.num_channels * config.patch_size**2, config.hidden_size) if image else None
    return ModelSizes(
        groups,
        len(blocks),
        config.hidden_size,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        (activations * last.in_features, last.in_features),
        (len(norms), 1),
        getattr(config, "rope_parameters", None) is not None,
        not image,
        (head[1], head[0]),
        patches,
        fused and bool(blr_modules(model)),
        fused,
    )


def activating(projection: Projection, width: int) -> Projection:
    """With the activation in its last stage, where it is compressed and as wide as what the MLP's last layer reads."""
    here = projection.form == "hf_blr" and projection.spec.out_features == width
    return replace(projection, adds=projection.adds or here)


def projection_groups(block: nn.Module, fused: bool) -> tuple[tuple[Projection, ...], ...]:
    """A block's projections in their order; if fused, those that `hf_blr.fuse` would run together in one group."""
    found: dict[tuple, list[Projection]] = {}
    for name, module in block.named_modules():
        if not isinstance(module, BLRLinear) and not is_dense_linear(module):
            continue
        parent, _, own = name.rpartition(".")
        group = next((names for names in TOGETHER if own in names), own)
        if isinstance(module, BLRLinear):
            together = (parent, group, type(module), module.spec.num_blocks) if fused else (name,)
            # cuBLAS adds that of a structure of plain products by itself
            by_us = module.spec.blocked or (fused and group != own)
            form = "float8" if module.storage == FORMATS["fp8"] else "hf_blr"
            projection = Projection(module.spec, form, module.bias is not None and by_us)
        else:
            projection, together = Projection(LowRank(*feature_sizes(module), 1), "dense"), (name,)
        found.setdefault(together, []).append(projection)
    return tuple(map(tuple, found.values()))
