"""Options that several commands share, those of a BLRConfig among them."""

from __future__ import annotations

import argparse
import os
from dataclasses import Field
from pathlib import Path
from typing import Any

import torch

from hf_blr.config import AUTO, BLRConfig, option_fields
from hf_blr.config.settings import FITTED
from hf_blr.config.texts import DEFAULT, dataset_from
from hf_blr.processes import Processes
from hf_blr.structures import block_pair_of, structures, whole_structures

DTYPE = "of the loaded weights: float32, bfloat16, float16, auto"


def add_model(
    parser: argparse.ArgumentParser,
    help: str = "a folder or hub id of a causal language model",
    dtype: str | None = "auto",
    dtype_help: str = DTYPE,
) -> None:
    parser.add_argument("model", metavar="MODEL", help=help)
    add_loading(parser, dtype, dtype_help)


def add_loading(parser: argparse.ArgumentParser, dtype: str | None = "auto", dtype_help: str = DTYPE) -> None:
    parser.add_argument("--gguf-file", metavar="NAME", help="read the dense weights from this GGUF file in MODEL")
    parser.add_argument("--dtype", type=dtype_named, default=dtype, help=dtype_help)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    help = "where to run; auto is the GPU, and the CPU where there is none"
    parser.add_argument("--device", type=device_named, default="auto", help=help)


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=Path, help="folder for the result")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds a model already")


def add_dataset(parser: argparse.ArgumentParser, default: str) -> None:
    """The text of a command that trains and measures."""
    parser.add_argument(
        "--dataset",
        type=calibration_text,
        default=default,
        help="a text as `hf-blr compress` takes it. Perplexity is measured on its held-out part, or on builtin where a "
        "model wrote it or texts are mixed",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to FILE")


def add_blr(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The options of a BLRConfig, from its fields; returns the group that says how much is kept, for more of them."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    size = None
    for field in option_fields():
        cli = dict(field.metadata["cli"])
        if "flag" not in cli:
            continue
        title = cli.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group: Any = groups[title]
        if cli.pop("size", False):
            size = group = size or group.add_mutually_exclusive_group(required=True)
        add_field(group, field, cli)
    assert size is not None
    groups[FITTED].add_argument(
        "--images", type=Path, metavar="FOLDER", help="images to fit a model of images to, in place of a text"
    )
    return size


def add_field(group: Any, field: Field[Any], cli: dict[str, Any]) -> None:
    """One option: a switch for a field that is True or False by default, a value for any other."""
    said = field.metadata["help"]
    flag, help = cli.pop("flag"), cli.pop("cli_help", (said[0].lower() + said[1:].rstrip(".")).replace("%", "%%"))
    cli.pop("none", None)
    if isinstance(field.default, bool):
        group.add_argument(flag, dest=field.name, action=f"store_{not field.default}".lower(), help=help)
        return
    if field.name == "structure":
        cli["choices"] = (*structures(), *whole_structures(), AUTO)
    if field.name == "num_blocks":
        cli["type"] = block_counts
    if field.name == "dataset":
        cli["type"] = calibration_text
    if cli.get("type") in (int, float):
        cli["metavar"] = "N" if cli["type"] is int else "X"
    group.add_argument(flag, dest=field.name, default=cli.pop("cli_default", field.default), help=help, **cli)


def blr_config(args: argparse.Namespace, **others: Any) -> BLRConfig:
    """The config of the options, with other fields in place of theirs."""
    if args.images is not None and args.dataset != DEFAULT:
        raise ValueError(f"--images {args.images} takes the place of --dataset {args.dataset}: leave one of them out")
    values = {field.name: getattr(args, field.name) for field in option_fields() if hasattr(args, field.name)} | others
    for field in option_fields():
        if values.get(field.name) is not None and values[field.name] == field.metadata["cli"].get("none"):
            values[field.name] = None
    return BLRConfig(**values)


def block_counts(text: str) -> tuple[int, int]:
    """`4x16`, or `4` for `4x4`; also sizes such as `4096x11008`."""
    try:
        return block_pair_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def calibration_text(text: str) -> str | dict[str, float]:
    """A name, a path, or a mixture such as `self=0.5,wikitext2=0.5`."""
    try:
        return dataset_from(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def launched(args: argparse.Namespace) -> Processes:
    """This process among those of torchrun or accelerate launch; `args.device` becomes its own GPU, if it has one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    args.device = str(PartialState(cpu=args.device == "cpu").device)
    return Processes(joined=True)


def dtype_named(name: str) -> str:
    if name == "auto" or getattr(getattr(torch, name, None), "is_floating_point", False):
        return name
    raise argparse.ArgumentTypeError(f"expected float32, bfloat16, float16 or auto, got {name!r}")


def device_named(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
