"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside the `with`, a path beside `path` to write to; at its end what was written takes the place of `path`.

    A program stopped half-way leaves the version before, and of two that write at once one wins whole. The folder is
    made where there is none.

    Raises:
        OSError: if the folder cannot be made or written to; the version before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the file, as a rename is one step within a file system only; files of tempfile are closed to other users
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one step; raises as `replacing`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
