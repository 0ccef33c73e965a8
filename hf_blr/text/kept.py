"""Windows of tokens in a file, to fit to again what took minutes to write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_blr.atomic import replacing
from hf_blr.text.windows import sample_windows

ENDING = ".safetensors"


def is_kept(dataset: Any) -> bool:
    """Whether the dataset is the name of a file of windows."""
    return isinstance(dataset, (str, os.PathLike)) and os.fspath(dataset).endswith(ENDING)


def check_name(file: str | os.PathLike[str]) -> None:
    """Raises ValueError if the file's ending is another."""
    if not is_kept(file):
        raise ValueError(f"windows are kept in a file ending in {ENDING}, got {os.fspath(file)!r}")


def keep_windows(windows: Tensor, file: str | os.PathLike[str]) -> None:
    """Writes windows, token ids `[n, seqlen]`, into a .safetensors file that `dataset=` takes.

    Raises:
        ValueError: for another ending, or what are no integers of two dimensions.
    """
    check_name(file)
    if windows.dim() != 2 or windows.is_floating_point():
        raise ValueError(f"windows must be token ids [n, seqlen], got {windows.dtype} of {list(windows.shape)}")
    with replacing(Path(file)) as part:
        save_file({"input_ids": windows.contiguous()}, part)


def kept_windows(file: str | os.PathLike[str], model: Any, seqlen: int, num_samples: int, seed: int) -> Tensor:
    """Windows `[n, seqlen]` of a file that `keep_windows` wrote; longer ones are cut into several.

    Raises:
        ValueError: if the file holds no windows, too short ones, or tokens that the model does not know.
    """
    try:
        windows = load_file(file)["input_ids"]
    except (FileNotFoundError, KeyError, SafetensorError) as error:
        raise ValueError(f"{os.fspath(file)!r} holds no windows that `hf-blr write` wrote: {error}") from error
    length, vocabulary = windows.shape[1], model.get_input_embeddings().weight.shape[0]
    if length < seqlen:
        raise ValueError(f"the windows in {os.fspath(file)!r} have {length} tokens: use a seqlen of at most {length}")
    if windows.max() >= vocabulary:
        raise ValueError(
            f"{os.fspath(file)!r} holds the token {int(windows.max())}, beyond the {vocabulary} of "
            f"{type(model).__name__}: was it written by another model?"
        )
    whole = windows[:, : length // seqlen * seqlen]
    return sample_windows(whole.flatten(), seqlen, num_samples, seed)
