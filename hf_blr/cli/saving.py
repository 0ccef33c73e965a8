"""Where commands write: looked at before the work, and filled after it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_blr.atomic import check_writable, write_text_atomically
from hf_blr.bench.environment import environment
from hf_blr.folders import clear_stopped, replacing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_blr.compression import Shards


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


def save(model: PreTrainedModel, reader: Any, folder: Path, shards: Shards | None = None) -> None:
    """Writes the model so that `from_pretrained(folder)` reads it, whole or not at all, and says how.

    Args:
        reader: the model's tokenizer or processor, if it has one.
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
            if reader is not None:
                reader.save_pretrained(new)
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
