"""replace a model's layers by block low-rank ones and save the result

Example: hf-blr compress HuggingFaceTB/SmolLM2-135M out --structure blast --ratio 0.7 --dataset wikitext2
"""

from __future__ import annotations

from hf_blr.cli import options
from hf_blr.cli.table import format_table


def add_arguments(parser):
    options.add_model(parser)
    options.add_output(parser)
    options.add_blr(parser)
    options.add_json(parser)


def run(args):
    from hf_blr.compression import compress

    options.check_output(args.output, args.overwrite)
    config = options.blr_config(args)
    model, tokenizer = options.load_model(args.model, args)
    report = compress(model, config, tokenizer=tokenizer)
    print(format_table(by_kind(report.layers)))
    print(report)
    options.save(model, tokenizer, args.output)
    options.write_json(args.json, {"model": args.model, "config": config.to_dict(), "report": report.to_dict()})


def by_kind(layers) -> list[dict]:
    """One row per layer name ending (q_proj, ...): sizes of the first, mean and worst error of all."""
    kinds: dict[str, list] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return [
        {
            "layers": f"{len(group)} x {kind}",
            "in x out": f"{group[0].spec.in_features} x {group[0].spec.out_features}",
            "structure": group[0].spec.structure,
            "blocks": "{} x {}".format(*group[0].spec.num_blocks),
            "rank": group[0].spec.rank,
            "kept": group[0].spec.ratio,
            "mean error": sum(layer.rel_error for layer in group) / len(group),
            "worst error": max(layer.rel_error for layer in group),
            "seconds": sum(layer.seconds for layer in group),
        }
        for kind, group in kinds.items()
    ]
