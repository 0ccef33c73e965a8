"""What several commands share: reading models, the options of a BLRConfig, and writing results."""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import nullcontext
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_blr.atomic import check_writable, write_text_atomically
from hf_blr.bench.environment import environment
from hf_blr.config import AUTO, QUANT_METHOD, BLRConfig, option_fields
from hf_blr.config.texts import dataset_from
from hf_blr.folders import clear_stopped, replacing_folder
from hf_blr.structures import block_pair_of, structures, whole_structures
from hf_blr.text import can_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_blr.compression import Shards


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
    parser.add_argument("--dtype", default=dtype, help=dtype_help)
    parser.add_argument("--device", default=default_device(), help="where to run")


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
    return size


def add_field(group: Any, field: Field[Any], cli: dict[str, Any]) -> None:
    """One option: a switch for a field that is True by default, a value for any other."""
    flag, help = cli.pop("flag"), cli.pop("cli_help", field.metadata["help"].replace("%", "%%"))
    cli.pop("none", None)
    if field.default is True:
        group.add_argument(flag, dest=field.name, action="store_false", help=help)
        return
    if field.name == "structure":
        cli["choices"] = (*structures(), *whole_structures(), AUTO)
    if field.name == "num_blocks":
        cli["type"] = block_counts
    if field.name == "dataset":
        cli["type"] = calibration_text
    group.add_argument(flag, dest=field.name, default=cli.pop("cli_default", field.default), help=help, **cli)


def blr_config(args: argparse.Namespace, **others: Any) -> BLRConfig:
    """The config of the options, with other fields in place of theirs."""
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


def load_model(path: str, args: argparse.Namespace, tokenizer: bool = True, on_disk: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) for MODEL and the loading options; a BLR checkpoint loads as one.

    Where `on_disk` says so, weights stay in the checkpoint's files, and accelerate reads them for each forward.

    The model is of the class that saved it: a classifier that is read as a language model loses its head. One that
    says no class, or that is read from a GGUF file, is a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from hf_blr.integration.loading import class_named
    from hf_blr.integration.patch import dequantizing_config

    own, source, quantization = None, {}, {}
    if args.gguf_file:
        source["gguf_file"] = args.gguf_file
        quantization["quantization_config"] = dequantizing_config()
    else:
        own = class_named(AutoConfig.from_pretrained(path))
    placed: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": args.offload_folder} if on_disk else {}
    model = (own or AutoModelForCausalLM).from_pretrained(path, dtype=args.dtype, **source, **quantization, **placed)
    model = model if on_disk else model.to(args.device)
    return model, AutoTokenizer.from_pretrained(path, **source) if tokenizer else None


def stored_config(path: str, config: Any) -> BLRConfig:
    """The plan and the rest of what a compressed model says of itself, from its transformers config.

    Raises:
        ValueError: if it is not compressed by this package, or says of no layer what it became.
    """
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("quant_method") != QUANT_METHOD or not stored.get("layers"):
        raise ValueError(
            f"{path} is not compressed by hf_blr: its quantization is {stored.get('quant_method')!r}; name a folder or "
            "hub id that `hf-blr compress` or save_pretrained wrote"
        )
    return BLRConfig(**stored)


def check_language_model(model: PreTrainedModel, path: str) -> None:
    """Raises ValueError for a model that does not predict the next token of its input."""
    if not can_write(model):
        raise ValueError(
            f"{path} holds a {type(model).__name__}, which predicts no next token: this command takes causal language "
            "models"
        )


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises ValueError if the folder cannot be written, or holds a model and may not be overwritten.

    What takes hours to compute is not lost for a wrong name then.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the result")
    if folder.is_mount():
        raise ValueError(f"{folder} is a mount point, in whose place nothing can be put; name a folder in it")
    clear_stopped(folder)
    check_folder(folder, folder)
    check_folder(folder.resolve().parent, folder)
    if (folder / "config.json").exists() and not overwrite:
        raise ValueError(f"{folder} already holds a model; choose another folder, or pass --overwrite")


def check_file(file: Path, overwrite: bool = True) -> None:
    """Raises ValueError if the file cannot be written, or exists and may not be overwritten."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no file that could be replaced; name a file for the result")
    check_folder(file.parent, file)
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists; choose another file, or pass --overwrite")


def check_folder(folder: Path, result: Path) -> None:
    """Raises ValueError, which names the result, if nothing can be written into its folder."""
    try:
        check_writable(folder)
    except OSError as error:
        why = f"{error.strerror or error}: {error.filename or folder}"
        raise ValueError(f"{result} cannot be written ({why}); name a place that can be") from None


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shards: Shards | None = None
) -> None:
    """Writes the model so that `from_pretrained(folder)` reads it, whole or not at all, and says how.

    Args:
        shards: hold a part of the model already, in a folder that the caller puts in the place of `folder`.

    Raises:
        OSError: naming the folder, if it cannot be written; what was in it stays.
    """
    from safetensors import SafetensorError

    from hf_blr.checkpoint.card import CARD, write_card
    from hf_blr.finetune.language import is_causal_lm

    try:
        with replacing_folder(folder) if shards is None else nullcontext(shards.folder) as new:
            if (folder / CARD).exists():
                # what somebody wrote into it stays
                shutil.copy(folder / CARD, new)
            model.save_pretrained(new) if shards is None else shards.save(model)
            write_card(new, model.config, folder.name)
            tokenizer.save_pretrained(new)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} cannot be written ({error}); what was in it is as it was") from error
    reader = "AutoModelForCausalLM" if is_causal_lm(model) else type(model).__name__
    print(f"saved to {folder}; load it with: import hf_blr; {reader}.from_pretrained({str(folder)!r})")


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes `result` with the machine and versions beside it."""
    if path is None:
        return
    write_text_atomically(path, json.dumps({**result, "environment": environment()}, indent=1) + "\n")
    print(f"numbers written to {path}")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
