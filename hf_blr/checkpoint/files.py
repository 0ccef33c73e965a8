"""What lies in a checkpoint's files, without their numbers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

#: (name, shape, dtype) of a tensor in a file
Header = tuple[str, tuple[int, ...], torch.dtype]

#: of files that end too early, or hold something else
UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)


def stored_tensors(files: list[str]) -> Iterator[Header]:
    """Those of every tensor in these files, safetensors or PyTorch's own.

    Raises:
        ValueError: naming a file that cannot be read, or a tensor that is in two of them.
    """
    seen: dict[str, str] = {}
    for file in files:
        for key, shape, dtype in tensors_in(file):
            if key in seen:
                raise ValueError(
                    f"{key}: is in {seen[key]} and in {file}, and which of the two counts is not known; remove the "
                    "file that does not belong to the checkpoint"
                )
            seen[key] = file
            yield key, shape, dtype


@contextmanager
def naming_files(folder: Path) -> Iterator[None]:
    """Inside the `with`, a load: where a weight file of the folder cannot be read, ValueError that names the file.

    The readers' own errors, which pass through otherwise, name none.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, *UNREADABLE):
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".bin"):
                for _ in tensors_in(str(file)):
                    break
        raise


def tensors_in(file: str) -> Iterator[Header]:
    """Those of every tensor in one file; raises ValueError, which names it, if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    found: list[Header] = []
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no mapping
                    entry = tensors.get_slice(key)
                    shape = tuple(entry.get_shape())
                    # an empty part of a tensor says its dtype in PyTorch's terms
                    found.append((key, shape, (entry[:0] if shape else tensors.get_tensor(key)).dtype))
        else:
            stored = torch.load(file, map_location="meta", weights_only=True)
            found = [(key, tuple(t.shape), t.dtype) for key, t in stored.items() if isinstance(t, torch.Tensor)]
    except (SafetensorError, *UNREADABLE) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: cannot be read ({reason}); it is damaged or cut short: fetch it again") from error
    yield from found
