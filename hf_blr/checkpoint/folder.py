"""A checkpoint's config, index and files, before transformers builds anything by them.

What is found here would cost minutes or gigabytes, hang, or end in an error of the reader's that names no file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from hf_blr.checkpoint.files import stored_tensors, weight_files
from hf_blr.checkpoint.headers import check_count
from hf_blr.checkpoint.notice import KEY, NOTICE
from hf_blr.config import QUANT_METHOD

#: modules that a plan may list, and blocks that a config may ask for, before somebody counts the tensors in the files
MANY = 1000
#: how the names of fields end that say how many blocks a model has
BLOCKS = ("layers", "n_layer", "depth")
#: fields by which transformers takes any config of quantisation for another package's
OF_OTHERS = ("load_in_4bit", "load_in_8bit")


def check_folder(folder: Path) -> None:
    """Looks at a folder of a compressed checkpoint; what is none, or has no config that can be read, is for others.

    Raises:
        ValueError: naming the file, for a config that nests too deep or holds a number too long to be read, an index
            that is none or names files elsewhere, a weight file that is none, and for more modules in the plan or
            blocks in the config than the files have tensors.
    """
    about = folder / "config.json"
    try:
        config = json.loads(about.read_bytes())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{about}: cannot be read ({error}); fetch it again") from None
    if not is_ours(config):
        return
    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if isinstance(name, str) and not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
            raise ValueError(f"{about}: {key} must name a dtype of PyTorch, got {name!r}")
    for path in sorted(folder.glob("*.index.json")):
        check_index(path)
    files = weight_files(folder)
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise ValueError(f"{file}: expected a file of weights, and this is none; fetch it again")
    layers = config["quantization_config"].get("layers")
    planned = layers if isinstance(layers, dict) and len(layers) > MANY else {}
    blocks = {key: value for key, value in counts_in(config) if value > MANY}
    if planned or blocks:
        stored = list(stored_tensors(files))
        check_count(planned, stored)
        for key, value in blocks.items():
            if stored and value > len(stored):
                raise ValueError(
                    f"{about}: {key} is {value}, and the checkpoint's files have {len(stored)} tensors, less than one "
                    "a block; load the checkpoint with the config.json that was saved with it"
                )


def check_index(path: Path) -> None:
    """Raises ValueError unless the index says of tensors in which files beside it they are."""
    try:
        index = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{path}: expected {{"metadata": {{...}}, "weight_map": {{tensor: file}}}}; fetch it again')
    for key, file in places.items():
        if not isinstance(file, str) or PurePosixPath(file).name != file:
            raise ValueError(f"{path}: {key} is in {file!r}, expected the name of a file beside the index")


def check_notice(config: dict[str, Any], path: Any) -> None:
    """Raises ValueError for a config that was saved as a compressed model's, and no longer says in which form it is.

    transformers would warn of a method that it does not know, or read another one's, and leave random weights.
    """
    if config.get(KEY) == NOTICE and not is_ours(config):
        found = config.get("quantization_config")
        method = found.get("quant_method") if isinstance(found, dict) else found
        others = [f" with {key}" for key in OF_OTHERS if isinstance(found, dict) and key in found]
        raise ValueError(
            f"{path}: config.json is that of a model compressed by hf_blr, but its quantization_config is of "
            f"{method!r}{''.join(others)}, expected quant_method {QUANT_METHOD!r}; load the checkpoint with the "
            "config.json that was saved with it"
        )


def is_ours(config: Any) -> bool:
    """Whether a config.json is of a model that this package compressed."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or any(key in found for key in OF_OTHERS):
        return False
    return found.get("quant_method") == QUANT_METHOD


def counts_in(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(field, number of blocks) of a config and of those inside it."""
    for key, value in config.items():
        if key == "quantization_config":
            continue
        if isinstance(value, dict):
            yield from counts_in(value)
        elif isinstance(value, int) and key.endswith(BLOCKS):
            yield key, value
