"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: of a model's weights: those of the version before do not stay beside new ones
WEIGHTS = (".safetensors", ".bin", ".index.json")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Inside the `with`, an empty folder beside `path` to write to; at its end it takes the place of `path`.

    What fails or is stopped leaves the version before. Files of that version which have no successor stay, unless they
    are weights.

    Raises:
        OSError: if nothing can be written there; the version before stays.
    """
    path = path.resolve()
    clear_stopped(path)
    new, old = (path.with_name(f"{beside(path)}{os.getpid()}-{version}") for version in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if old.exists():
        for entry in old.iterdir():
            if not entry.name.endswith(WEIGHTS) and not (path / entry.name).exists():
                os.rename(entry, path / entry.name)
        shutil.rmtree(old)


def clear_stopped(path: Path) -> None:
    """Remove what a process of this machine that was killed while it replaced this folder has left beside it.

    If it was killed between taking the old version away and putting the new one there, the old one comes back.
    """
    path = path.resolve()
    mark = beside(path)
    for entry in sorted(path.parent.iterdir() if path.parent.is_dir() else ()):
        process, _, version = entry.name.removeprefix(mark).partition("-")
        if not entry.name.startswith(mark) or not process.isdigit() or is_running(int(process)):
            continue
        if version == "old" and not path.exists():
            os.rename(entry, path)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def beside(path: Path) -> str:
    """How the names of versions that processes of this machine write begin; a rename is one step beside a folder."""
    return f".{path.name}-{socket.gethostname()}-"


def is_running(process: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # somebody else's
        return True
    return True
