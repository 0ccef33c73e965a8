"""show what a compressed model is made of, or what a dense one offers to compress

Reads the config only, no weights.

Example: hf-blr inspect out
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from hf_blr.cli import options
from hf_blr.cli.layer_table import by_kind, rows_by_kind
from hf_blr.cli.table import format_table
from hf_blr.config.texts import describe
from hf_blr.dense import feature_sizes
from hf_blr.experts import ExpertsTensor, layer_named
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
        dtype = getattr(config, "dtype", None) or torch.float32
        rows, note = compressed_rows(stored if isinstance(stored, dict) else stored.to_dict(), dtype)
    print(format_table(rows))
    print(note)
    options.write_json(args.json, {"model": args.model, "rows": rows})


def compressed_rows(stored: dict, dtype: torch.dtype) -> tuple[list[dict], str]:
    """One row per kind of layer, and a summary; bits are those stored for each weight of the dense matrix.

    Args:
        stored: the `quantization_config`.
        dtype: of the saved model, for what the plain format keeps.
    """
    if stored.get("quant_method") != "hf_blr" or not stored.get("layers"):
        raise ValueError(f"this model is quantised with {stored.get('quant_method')!r}, not compressed by hf_blr")
    plan = plan_from_layers(stored["layers"])
    specs = {name: layer.spec for name, layer in plan.items()}
    many = {name: layer.matrices for name, layer in plan.items()}
    bytes_of = {name: many[name] * layer.storage.num_bytes(layer.spec, dtype) for name, layer in plan.items()}
    dense_of = {name: many[name] * layer.spec.dense_parameters for name, layer in plan.items()}
    rows = [
        {
            **row,
            "format": ", ".join(dict.fromkeys(plan[name].storage.name for name in group)),
            "bits a weight": bits_a_weight(bytes_of, dense_of, group),
        }
        for row, group in zip(rows_by_kind(specs, many), by_kind(specs).values(), strict=True)
    ]
    kept = sum(layer.matrices * layer.spec.num_parameters for layer in plan.values())
    dense = sum(dense_of.values())
    fitted = f"activations on {describe(stored['dataset'])}" if stored.get("dataset") else "weights"
    return rows, (
        f"{len(plan)} layers hold {kept / 1e6:.1f} M of {dense / 1e6:.1f} M parameters ({100 * kept / dense:.1f} %), "
        f"{sum(bytes_of.values()) / 1e6:.1f} MB, {bits_a_weight(bytes_of, dense_of, list(plan)):.2f} bits a weight, "
        f"fitted to {fitted}"
    )


def bits_a_weight(bytes_of: dict[str, int], dense_of: dict[str, int], names: list[str]) -> float:
    """Bits that these layers store together for each number of their dense matrices."""
    return 8 * sum(bytes_of[name] for name in names) / sum(dense_of[name] for name in names)


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
