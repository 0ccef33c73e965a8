"""show what a compressed model is made of, or what a dense one offers to compress

Reads the config only, no weights.

Example: hf-blr inspect out
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from hf_blr.cli import loading, options, saving
from hf_blr.config.texts import describe
from hf_blr.dense import feature_sizes
from hf_blr.experts import ExpertsTensor, layer_named
from hf_blr.markdown import format_table
from hf_blr.plan import plan_from_layers
from hf_blr.plan.rows import stored_rows
from hf_blr.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder or hub id")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model)
    if getattr(config, "quantization_config", None) is None:
        rows, note = dense_rows(config)
    else:
        stored = loading.stored_config(args.model, config)
        rows, note = stored_rows(plan_from_layers(stored.layers or {}), config.dtype or torch.float32)
        note += f", fitted to {f'activations on {describe(stored.dataset)}' if stored.calibrated else 'weights'}"
    print(format_table(rows))
    print(note)
    saving.write_json(args.json, {"model": args.model, "rows": rows})


def dense_rows(config: PreTrainedConfig) -> tuple[list[dict], str]:
    """One row per kind of layer that would be replaced by default."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from hf_blr.integration.loading import class_named

    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    own = class_named(config)
    with torch.device("meta"):
        model = own._from_config(config) if own else auto.from_config(config)
    groups: dict[tuple, int] = {}
    for name in find_targets(model):
        layer = layer_named(model, name)
        key = name.rpartition(".")[2], *feature_sizes(layer)
        groups[key] = groups.get(key, 0) + (layer.num_experts if isinstance(layer, ExpertsTensor) else 1)
    rows = [
        {"layers": f"{count} x {kind}", "in x out": f"{k} x {n}", "parameters (M)": count * k * n / 1e6}
        for (kind, k, n), count in groups.items()
    ]
    total = sum(p.numel() for p in model.parameters())
    share = 1e6 * sum(row["parameters (M)"] for row in rows) / total
    return rows, f"not compressed; these layers are {100 * share:.1f} % of its {total / 1e6:.1f} M parameters"
