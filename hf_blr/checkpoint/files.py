"""What lies in a checkpoint's files, without their numbers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

import torch

#: (name, shape, dtype) of a tensor in a file
Header = tuple[str, tuple[int, ...], torch.dtype]

#: of files that end too early, or hold something else
UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)
#: by an unpickler that reads what was never pickled, and by who takes what it returns for a dict of tensors
UNPICKLED = (KeyError, IndexError, AttributeError, TypeError)


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
    except (SafetensorError, *UNREADABLE, *UNPICKLED):
        for file in weight_files(folder):
            for _ in tensors_in(file):
                break
        raise


def weight_files(folder: Path) -> list[str]:
    """The files of a checkpoint, under the names that transformers gives them: safetensors where there are any."""
    return [str(path) for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))]


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
            found = pickled_tensors(file)
    except (SafetensorError, *UNREADABLE) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: cannot be read ({reason}); it is damaged or cut short: fetch it again") from error
    yield from found


def pickled_tensors(file: str) -> list[Header]:
    """Those of a file in PyTorch's own format, without code from it, and without room for numbers.

    Raises:
        ValueError: naming the file and what in it is no tensor that a model can take: a sparse one, one without
            numbers, or one with fewer in the file than its shape has, for which a reader would make room.
    """
    # files before PyTorch 1.6 cannot be mapped
    place = {"map_location": "cpu", "mmap": True} if is_zipfile(file) else {"map_location": "meta"}
    try:
        stored = torch.load(file, weights_only=True, **place)
    except UNPICKLED as error:
        raise pickle.UnpicklingError(f"no file of tensors, {type(error).__name__}: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise ValueError(f"{file}: expected a dict of tensors by name, got {type(stored).__name__}; fetch it again")
    found = []
    for key, tensor in stored.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if plain and place["map_location"] == "cpu":
            plain = not tensor.is_meta
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{key}: in {file} it is no tensor with all of its numbers; save it again as a plain one")
        found.append((key, tuple(tensor.shape), tensor.dtype))
    return found
