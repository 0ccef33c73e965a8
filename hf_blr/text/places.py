"""Text that lies in files and folders, or on the hub under an id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hf_blr.config.texts import known_names
from hf_blr.text.named import datasets_for, load_from_hub
from hf_blr.text.tables import Reading, read_table

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
#: endings of tables, and the reader of `datasets` for each
TABLE_READERS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_place(place: str, reading: Reading) -> list[str]:
    """The documents of a path or a hub id, either with an optional ":column"."""
    path, column = split_column(place)
    root = Path(path).expanduser()
    # of a name that can be none (too long, with a zero byte) these say no
    if os.path.isdir(root):
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"the folder {path!r} holds no file ending in {', '.join(TEXT_SUFFIXES)}")
        return [read_file(file) for file in files]
    if os.path.isfile(root):
        reader = TABLE_READERS.get(root.suffix.lower())
        if reader is not None:
            table = datasets_for(path).load_dataset(reader, data_files=str(root), split="train")
            return read_table(table, reading, column)
        if column is not None:
            raise ValueError(f"{path!r} has no column {column!r}: only {', '.join(TABLE_READERS)} files have columns")
        return [read_file(root)]
    if HUB_ID.fullmatch(path):
        try:
            table = load_from_hub(path, path, streaming=reading.enough is not None)
        except ConnectionError as error:
            raise ConnectionError(f"{path!r} is no file or folder here. {error}") from error
        except ValueError as error:
            # of several configurations it names them
            raise ValueError(
                f"{path!r} cannot be loaded by its name alone: {error}. Pass what datasets.load_dataset(..., "
                "streaming=True) gives"
            ) from error
        return read_table(table, reading, column)
    shown = path if len(path) <= 80 else path[:80] + "..."
    raise ValueError(
        f"{shown!r} is neither the name of a dataset ({known_names()}) nor a file or folder here; "
        "text itself is given as a list of strings, [text]"
    )


def split_column(place: str) -> tuple[str, str | None]:
    """(path or hub id, column or None)."""
    path, _, column = place.rpartition(":")
    if os.path.exists(Path(place).expanduser()) or not column:
        return place, None
    named = os.path.exists(Path(path).expanduser()) or HUB_ID.fullmatch(path)
    return (path, column) if path and named else (place, None)


def read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text: {error}") from error
