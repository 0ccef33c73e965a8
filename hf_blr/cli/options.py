"""What several commands share: reading models, the options of a BLRConfig, and writing results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from hf_blr.atomic import write_text_atomically
from hf_blr.bench.environment import environment
from hf_blr.config import ALLOCATIONS, BLRConfig


def add_model(parser: argparse.ArgumentParser, help="a folder or hub id of a causal language model"):
    parser.add_argument("model", metavar="MODEL", help=help)
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser):
    parser.add_argument("--gguf-file", metavar="NAME", help="read the dense weights from this GGUF file in MODEL")
    parser.add_argument("--dtype", default="auto", help="of the loaded weights: float32, bfloat16, float16, auto")
    parser.add_argument("--device", default=default_device(), help="where to run")


def add_output(parser: argparse.ArgumentParser):
    parser.add_argument("output", metavar="OUT", type=Path, help="folder for the result")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds a model already")


def add_json(parser: argparse.ArgumentParser):
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to FILE")


def add_blr(parser: argparse.ArgumentParser):
    """The options that make a BLRConfig; returns the group of those that say how much is kept, for more of them."""
    group = parser.add_argument_group("what the layers become")
    group.add_argument(
        "--structure",
        choices=("low_rank", "pivoted", "monarch", "blast", "auto"),
        default="blast",
        help="auto chooses one for each layer, its blocks too",
    )
    size = group.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=float, help="kept / dense parameters of the replaced layers, 0 to 1")
    size.add_argument("--rank", type=int, help="rank of each replaced layer (Monarch: of each block pair)")
    group.add_argument(
        "--num-blocks",
        type=block_counts,
        metavar="B or B1xB2",
        help="input x output blocks; 4x16 for BLAST and 4x4 for Monarch if left out",
    )
    group.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="names or endings of the layers to replace; all attention and MLP projections if left out",
    )
    group.add_argument("--keep-dense", nargs="+", metavar="NAME", help="names or endings of layers to leave alone")
    fit = parser.add_argument_group("how they are fitted")
    fit.add_argument(
        "--dataset",
        help='text to fit to: builtin, wikitext2, c4, a text file or a folder; "none" fits the weights alone',
        default="builtin",
    )
    fit.add_argument(
        "--one-shot",
        action="store_true",
        help="fit each layer to the dense model's activations, not to those of the layers compressed before it: faster",
    )
    fit.add_argument(
        "--no-fisher",
        action="store_true",
        help="weigh all outputs of a layer alike: saves a backward pass over the calibration text",
    )
    fit.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        help="loss: share the ratio out over the layers by what the model's loss feels (the default where it can be); "
        "uniform: the same ratio for each",
    )
    fit.add_argument(
        "--block-steps",
        type=int,
        default=0,
        help="gradient steps that refine the factors of each block together after their fits; 0: none",
    )
    fit.add_argument("--num-samples", type=int, default=128, help="calibration windows at most")
    fit.add_argument("--seqlen", type=int, default=2048, help="tokens in a calibration window")
    fit.add_argument("--rounds", type=int, default=16, help="rounds of alternating solves at most")
    fit.add_argument("--seed", type=int, default=0)
    return size


def blr_config(args) -> BLRConfig:
    return BLRConfig(
        structure=args.structure,
        ratio=args.ratio,
        rank=args.rank,
        num_blocks=args.num_blocks,
        target_modules=args.target_modules,
        modules_to_not_convert=args.keep_dense,
        dataset=None if args.dataset == "none" else args.dataset,
        sequential=not args.one_shot,
        fisher=not args.no_fisher,
        allocation=args.allocation,
        block_steps=args.block_steps,
        num_samples=args.num_samples,
        seqlen=args.seqlen,
        fit_rounds=args.rounds,
        seed=args.seed,
    )


def block_counts(text: str) -> int | tuple[int, int]:
    """`4` or `4x16`."""
    try:
        counts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected B or B1xB2, such as 4x16, got {text!r}") from None
    return counts[0] if len(counts) == 1 else tuple(counts)


def load_model(path: str, args, tokenizer=True):
    """(model, tokenizer) for MODEL and the loading options; a BLR checkpoint loads as one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_blr.integration.patch import dequantizing_config

    source = {}
    if args.gguf_file:
        source["gguf_file"] = args.gguf_file
    quantization = {"quantization_config": dequantizing_config()} if args.gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, **source, **quantization)
    return model.to(args.device), AutoTokenizer.from_pretrained(path, **source) if tokenizer else None


def check_output(folder: Path, overwrite: bool):
    """Raises ValueError if the folder holds a model and may not be overwritten."""
    if (folder / "config.json").exists() and not overwrite:
        raise ValueError(f"{folder} already holds a model; choose another folder, or pass --overwrite")
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the result")


def save(model, tokenizer, folder: Path):
    """Writes the model so that `from_pretrained(folder)` reads it, and says how."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved to {folder}; load it with: import hf_blr; AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def write_json(path: Path | None, result: dict):
    """Writes `result` with the machine and versions beside it."""
    if path is None:
        return
    write_text_atomically(path, json.dumps({**result, "environment": environment()}, indent=1) + "\n")
    print(f"numbers written to {path}")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
