"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one step, and its folder where there is none.

    A program stopped half-way leaves the version before, and of two that write at once one wins whole.

    Raises:
        OSError: if the folder cannot be made or written to; the version before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the file, as a rename is one step within a file system only; files of tempfile are closed to other users
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
