"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def left_by_killed(folder: Path) -> list[Path]:
    """What programs that were killed inside `replacing` have left in the folder, or programs at work write there."""
    return [path for path in folder.glob(".*") if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name)]


def check_writable(folder: Path) -> None:
    """Makes the folder, writes a file into it and leaves everything as it was. Raises OSError where that fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        scratch = folder / f".{uuid.uuid4().hex}"
        # a byte, since a full disk takes empty files
        scratch.write_bytes(b" ")
        scratch.unlink()
    finally:
        for path in reversed(made):
            # another program may have begun to use it
            with suppress(OSError):
                path.rmdir()


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one step; raises as `replacing`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
