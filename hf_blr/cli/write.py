"""let a dense model write the text that it is to be fitted to, and keep it

Sampling takes minutes; several compressions can then share the file as --dataset FILE.

Example: hf-blr write HuggingFaceTB/SmolLM2-135M text.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_blr.cli import loading, options, saving
from hf_blr.config.settings import BLRSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("output", metavar="FILE", type=Path, help="a .safetensors file for the windows of tokens")
    parser.add_argument("--overwrite", action="store_true", help="write over a FILE that exists")
    parser.add_argument("--num-samples", type=int, default=BLRSettings.num_samples, help="windows")
    parser.add_argument("--seqlen", type=int, default=BLRSettings.seqlen, help="tokens in a window")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--chat", action="store_true", help="conversations, opened by the tokenizer's chat template")
    begin.add_argument(
        "--begin-with",
        metavar="TEXT",
        type=options.calibration_text,
        help="go on from pieces of this text, as --dataset of `hf-blr compress` takes it, in the place of an empty "
        "document: more text of its kind",
    )
    parser.add_argument("--begin-tokens", type=int, default=32, metavar="N", help="in such a piece (default: 32)")
    parser.add_argument("--seed", type=int, default=BLRSettings.seed, help="of the sampling")


def run(args: argparse.Namespace) -> None:
    from hf_blr.text import keep_windows, load_windows, write_windows
    from hf_blr.text.kept import check_name

    check_name(args.output)
    saving.check_file(args.output, args.overwrite)
    model, reader = loading.load_model(args.model, args)
    tokenizer = loading.tokenizer_of(reader)
    sizes, begin = (args.num_samples, args.seqlen, args.seed), None
    if args.begin_with is not None:
        begin = load_windows(args.begin_with, model, tokenizer, args.begin_tokens, args.num_samples, args.seed)
    windows = write_windows(model, tokenizer, *sizes, chat=args.chat, beginnings=begin)
    keep_windows(windows, args.output)
    print(f"{windows.numel()} tokens written to {args.output}; fit to them with --dataset {args.output}")
