"""measure the perplexity of models, dense or compressed, on the same text, or their scores on tasks

Token perplexity over windows that do not overlap, as the compression papers count it; --stride gives the sliding
window of the Transformers documentation. Models that share a tokenizer can be compared.

With --tasks, lm-eval (pip install lm-eval) scores tasks by name, instead of a perplexity.

Example: hf-blr evaluate HuggingFaceTB/SmolLM2-135M out --dataset wikitext2
Example: hf-blr evaluate HuggingFaceTB/SmolLM2-135M out --tasks arc_easy,hellaswag --limit 200
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_blr.cli import loading, options, saving
from hf_blr.config import BLRConfig
from hf_blr.markdown import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="+", help="folders or hub ids of causal language models")
    options.add_loading(parser)
    parser.add_argument("--dataset", default="wikitext2", help="wikitext2, c4, builtin, a file, a folder or a hub id")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--stride", type=int, help="tokens between the starts of two windows; seqlen if left out")
    parser.add_argument("--max-windows", type=int, help="score only the first windows")
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument("--tasks", metavar="NAME[,NAME]", help="score these instead of a perplexity")
    tasks.add_argument("--task-folder", metavar="DIR", type=Path, help="holds task files of your own")
    tasks.add_argument("--num-fewshot", type=int, help="examples in each prompt; what each task says if left out")
    tasks.add_argument("--limit", type=int, help="documents of each task; all of them if left out")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.tasks is None:
        run_perplexity(args)
    else:
        run_tasks(args)


def models_of(args: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """(MODEL, model, tokenizer) for each that is named, in turn."""
    for path in args.model:
        model, reader = loading.load_model(path, args)
        loading.check_language_model(model, path)
        yield path, model, loading.tokenizer_of(reader)


def run_tasks(args: argparse.Namespace) -> None:
    """One row a model and task."""
    from hf_blr.evaluation import task_scores

    rows, results = [], []
    for path, model, tokenizer in models_of(args):
        settings = {"folder": args.task_folder, "num_fewshot": args.num_fewshot, "limit": args.limit}
        scores = task_scores(model, tokenizer, args.tasks.split(","), **settings)
        results.append({"model": path, "scores": scores})
        for task, metrics in scores.items():
            shown = {metric: score for metric, score in metrics.items() if "_stderr" not in metric}
            rows.append({"model": path, "task": task, "scores": ", ".join(f"{m} {s:.4f}" for m, s in shown.items())})
    print(format_table(rows))
    saving.write_json(args.json, {"rows": results})


def run_perplexity(args: argparse.Namespace) -> None:
    """One row a model."""
    from hf_blr.compression import parameter_sizes
    from hf_blr.evaluation import perplexity
    from hf_blr.plan import plan_from_layers
    from hf_blr.plan.rows import bits_a_weight

    rows, results = [], []
    for path, model, tokenizer in models_of(args):
        settings = {"seqlen": args.seqlen, "stride": args.stride, "max_windows": args.max_windows}
        result = perplexity(model, tokenizer, args.dataset, progress=True, **settings)
        parameters, size = parameter_sizes(model)
        config = getattr(model.config, "quantization_config", None)
        plan = plan_from_layers(config.layers or {}) if isinstance(config, BLRConfig) else {}
        # of what is compressed; a dense model's layers take what its dtype does
        bits = bits_a_weight(plan, model.dtype) if plan else 8.0 * model.dtype.itemsize
        results.append({"model": path, "parameters": parameters, "bytes": size, "bits": bits, **result.to_dict()})
        rows.append(
            {
                "model": path,
                "parameters (M)": parameters / 1e6,
                "MB": size / 1e6,
                "bits a weight": bits,
                "perplexity": result.ppl,
                "tokens/s": result.tokens_per_second,
            }
        )
    print(format_table(rows))
    print(result.protocol)
    saving.write_json(args.json, {"rows": results})
