"""The files of a journal, each written whole or not at all and read with an error that says which one is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_blr.atomic import replacing, write_text_atomically

#: what readers raise for files that are cut short or hold something else
UNREADABLE = (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError)

Found = TypeVar("Found")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """A safetensors file with these tensors and, as JSON, what else is said of them. Raises OSError."""
    # not `save_file`, whose error for a full disk is none of the operating system's
    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {"said": json.dumps(said)})
    with replacing(path) as scratch:
        scratch.write_bytes(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(tensors in memory of their own, on the CPU; what else was said). Raises ValueError that names the file."""

    def read() -> tuple[dict[str, Tensor], Any]:
        data = path.read_bytes()
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        size = int.from_bytes(data[:8], "little")
        return tensors, json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["said"])

    return naming(path, read)


def write_tensor(path: Path, tensor: Tensor) -> None:
    """One tensor, as a calibration's store reads it. Raises OSError."""
    try:
        with replacing(path) as scratch:
            torch.save(tensor.detach().cpu(), scratch)
    except RuntimeError as error:
        # of a full disk, PyTorch's writer says how many bytes it missed
        raise OSError(f"{path} cannot be written ({str(error).partition(chr(10))[0]}); is the disk full?") from error


def write_json(path: Path, value: Any) -> None:
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """What `write_json` wrote, a dict with these keys. Raises ValueError that names the file."""

    def read() -> dict[str, Any]:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or set(found) != set(keys):
            raise ValueError(f"expected {', '.join(keys)}, got {sorted(found) if isinstance(found, dict) else found}")
        return found

    return naming(path, read)


def naming(path: Path, read: Callable[[], Found]) -> Found:
    """What `read` finds in the file. Raises ValueError that names it, where that is damaged."""
    try:
        return read()
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read ({reason}); remove it, and what it held is done again") from error
