"""measure the perplexity of models, dense or compressed, on the same text

Token perplexity over windows that do not overlap, as the compression papers count it; --stride gives the sliding
window of the Transformers documentation. Models that share a tokenizer can be compared.

Example: hf-blr evaluate HuggingFaceTB/SmolLM2-135M out --dataset wikitext2
"""

from __future__ import annotations

import argparse

from hf_blr.cli import options
from hf_blr.cli.table import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="+", help="folders or hub ids of causal language models")
    options.add_loading(parser)
    parser.add_argument("--dataset", default="wikitext2", help="wikitext2, c4, builtin, a file, a folder or a hub id")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--stride", type=int, help="tokens between the starts of two windows; seqlen if left out")
    parser.add_argument("--max-windows", type=int, help="score only the first windows")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from hf_blr.compression import parameter_sizes
    from hf_blr.evaluation import perplexity

    rows, results = [], []
    for path in args.model:
        model, tokenizer = options.load_model(path, args)
        options.check_language_model(model, path)
        settings = {"seqlen": args.seqlen, "stride": args.stride, "max_windows": args.max_windows}
        result = perplexity(model, tokenizer, args.dataset, progress=True, **settings)
        parameters, size = parameter_sizes(model)
        results.append({"model": path, "parameters": parameters, "bytes": size, **result.to_dict()})
        rows.append(
            {
                "model": path,
                "parameters (M)": parameters / 1e6,
                "MB": size / 1e6,
                "perplexity": result.ppl,
                "tokens/s": result.tokens_per_second,
            }
        )
    print(format_table(rows))
    print(result.protocol)
    options.write_json(args.json, {"rows": results})
