"""Models that commands read, and what they say of themselves."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.text import can_write, reads_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: one of them at least lies beside a model that has a tokenizer
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def load_model(
    path: str, args: argparse.Namespace, reader: bool = True, on_disk: bool = False, textless: bool = False
) -> tuple[Any, Any]:
    """(model, reader) for MODEL and the loading options; a BLR checkpoint loads as one.

    The model is of the class that saved it: a classifier that is read as a language model loses its head. One that
    says no class, or that is read from a GGUF file, is a causal language model.

    Args:
        reader: False reads none, and gives None.
        on_disk: weights stay in the checkpoint's files, and accelerate reads them for each forward.
        textless: the command reads no text, so that the reader may be missing.

    Raises:
        ValueError: if the device is a GPU and there is none, or a model of text has no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_blr.integration.loading import class_named
    from hf_blr.integration.source import dequantizing_config, reading_once

    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this build of PyTorch sees no GPU here; pass --device auto or cpu")
    own, source, quantization = None, {}, {}
    if args.gguf_file:
        source["gguf_file"] = args.gguf_file
        quantization["quantization_config"] = dequantizing_config()
    else:
        own = class_named(AutoConfig.from_pretrained(path))
    placed: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": args.offload_folder} if on_disk else {}
    with reading_once():
        model = (own or AutoModelForCausalLM).from_pretrained(
            path, dtype=args.dtype, **source, **quantization, **placed
        )
        model = model if on_disk else model.to(args.device)
        return model, load_reader(path, model, source, textless) if reader else None


def load_reader(path: str, model: PreTrainedModel, source: dict[str, Any], textless: bool = False) -> Any:
    """What makes inputs of text, images or sounds: a processor where there is one, else the tokenizer.

    None where the files hold neither, for a model of images or sounds, or if `textless`.

    Raises:
        ValueError: if a model of text has no tokenizer.
    """
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer
    from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, cached_file

    names = () if source else (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME)
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if not any(cached_file(path, name, **missing) for name in names):
        if not reads_text(model):
            return None
        try:
            return AutoTokenizer.from_pretrained(path, **source)
        except (OSError, ValueError) as error:
            # transformers speaks of packages to install, whatever is missing
            if source or any(cached_file(path, name, **missing) for name in TOKENIZER_FILES):
                raise
            if textless:
                return None
            raise ValueError(
                f"{path} holds no tokenizer: save the model's there (tokenizer.save_pretrained); nothing but `hf-blr "
                "compress --dataset none` does without"
            ) from error
    try:
        return AutoProcessor.from_pretrained(path)
    except (ImportError, OSError, TypeError, ValueError):
        # where a processor of its kind has a tokenizer too, which a classifier of sounds lacks
        return AutoFeatureExtractor.from_pretrained(path)


def tokenizer_of(reader: Any) -> Any:
    """The part of a reader that reads text."""
    return getattr(reader, "tokenizer", reader)


def fitted_to(args: argparse.Namespace, reader: Any) -> dict[str, Any]:
    """The arguments of `compress` for the text or the images that the options name. Raises ValueError."""
    if args.images is None:
        return {"tokenizer": tokenizer_of(reader)}
    if reader is None:
        raise ValueError(
            f"--images {args.images} go through the model's processor, which lies not beside it: save it there "
            "(processor.save_pretrained), or leave --images out to fit the weights alone"
        )
    return {"tokenizer": reader, "calibration": args.images}


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
