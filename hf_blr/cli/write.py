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
    parser.add_argument("--chat", action="store_true", help="conversations, opened by the tokenizer's chat template")
    parser.add_argument("--seed", type=int, default=BLRSettings.seed, help="of the sampling")


def run(args: argparse.Namespace) -> None:
    from hf_blr.text import keep_windows, write_windows
    from hf_blr.text.kept import check_name

    check_name(args.output)
    saving.check_file(args.output, args.overwrite)
    model, reader = loading.load_model(args.model, args)
    tokenizer = loading.tokenizer_of(reader)
    windows = write_windows(model, tokenizer, args.num_samples, args.seqlen, args.seed, chat=args.chat)
    keep_windows(windows, args.output)
    print(f"{windows.numel()} tokens written to {args.output}; fit to them with --dataset {args.output}")
