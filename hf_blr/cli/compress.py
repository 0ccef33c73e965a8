"""replace a model's layers by block low-rank ones and save the result

Example: hf-blr compress HuggingFaceTB/SmolLM2-135M out --structure blast --ratio 0.7 --dataset wikitext2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_blr.cli import options
from hf_blr.cli.plan import read_plan
from hf_blr.markdown import format_table
from hf_blr.plan.rows import by_kind, rows_by_kind

if TYPE_CHECKING:
    from hf_blr.compression.report import LayerReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser)
    size = options.add_blr(parser)
    # a structure that keeps the whole matrix has no size; of any other, the config asks for one
    size.required = False
    size.add_argument(
        "--plan", type=Path, metavar="FILE", help="a plan that `hf-blr plan` wrote: layers, ranks and all"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from hf_blr.checkpoint.origin import public_command, record_origin
    from hf_blr.compression import compress

    options.check_output(args.output, args.overwrite)
    config = options.blr_config(args, layers=None if args.plan is None else read_plan(args.plan))
    model, tokenizer = options.load_model(args.model, args)
    report = compress(model, config, tokenizer=tokenizer)
    record_origin(model, command=public_command(args.words))
    print(format_table(layer_rows(report.layers)))
    print(report)
    options.save(model, tokenizer, args.output)
    options.write_json(args.json, {"model": args.model, "config": config.to_dict(), "report": report.to_dict()})


def layer_rows(layers: list[LayerReport]) -> list[dict[str, Any]]:
    """One row for each kind of layer: what it became, mean and worst error, seconds."""
    specs = {layer.name: layer.spec for layer in layers}
    reports = {layer.name: layer for layer in layers}
    rows = []
    for row, names in zip(rows_by_kind(specs), by_kind(specs).values(), strict=True):
        errors = [reports[name].rel_error for name in names]
        fit = {"mean error": sum(errors) / len(errors), "worst error": max(errors)}
        rows.append({**row, **fit, "seconds": sum(reports[name].seconds for name in names)})
    return rows
