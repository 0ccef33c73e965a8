"""show what a compressed model is made of, or what a dense one offers to compress

Reads the config only, no weights.

Example: hf-blr inspect out
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from hf_blr.cli import options
from hf_blr.cli.layer_table import rows_by_kind
from hf_blr.cli.table import format_table
from hf_blr.config.texts import describe
from hf_blr.dense import feature_sizes
from hf_blr.plan import plan_from_layers
from hf_blr.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder or hub id")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        rows, note = dense_rows(config)
    else:
        rows, note = compressed_rows(stored if isinstance(stored, dict) else stored.to_dict())
    print(format_table(rows))
    print(note)
    options.write_json(args.json, {"model": args.model, "rows": rows})


def compressed_rows(stored: dict) -> tuple[list[dict], str]:
    """One row per kind of layer, and a summary."""
    if stored.get("quant_method") != "hf_blr" or not stored.get("layers"):
        raise ValueError(f"this model is quantised with {stored.get('quant_method')!r}, not compressed by hf_blr")
    plan = plan_from_layers(stored["layers"])
    rows = rows_by_kind({name: layer.spec for name, layer in plan.items()})
    kept = sum(layer.spec.num_parameters for layer in plan.values())
    dense = sum(layer.spec.dense_parameters for layer in plan.values())
    fitted = f"activations on {describe(stored['dataset'])}" if stored.get("dataset") else "weights"
    return rows, (
        f"{len(plan)} layers hold {kept / 1e6:.1f} M of {dense / 1e6:.1f} M parameters ({100 * kept / dense:.1f} %), "
        f"fitted to {fitted}"
    )


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
        key = name.rpartition(".")[2], *feature_sizes(model.get_submodule(name))
        groups[key] = groups.get(key, 0) + 1
    rows = [
        {"layers": f"{count} x {kind}", "in x out": f"{k} x {n}", "parameters (M)": count * k * n / 1e6}
        for (kind, k, n), count in groups.items()
    ]
    total = sum(p.numel() for p in model.parameters())
    share = 1e6 * sum(row["parameters (M)"] for row in rows) / total
    return rows, f"not compressed; these layers are {100 * share:.1f} % of its {total / 1e6:.1f} M parameters"
