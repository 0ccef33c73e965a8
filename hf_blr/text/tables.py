"""The column of a table, a stream of rows or a dictionary of them that holds text or conversations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

#: rows read at a time: those of one block follow each other, as the lines of one article do
ROWS_PER_READ = 1000


class Reading(NamedTuple):
    """What is read of a table; see `load_text`."""

    split: str
    tokenizer: Any
    enough: int | None
    seed: int


def read_table(table: Any, reading: Reading, column: str | None = None) -> list[str]:
    """The documents of a `datasets.Dataset`, an `IterableDataset`, or of the fitting split of a dictionary of them.

    Raises:
        ValueError: if there is no such split or column, or no clear one, or conversations meet no chat template.
        TypeError: for a stream that is to be read to its end.
    """
    if isinstance(table, dict):
        table = fitting_split(table, reading.split)
    streams = not hasattr(table, "__len__")
    if streams and reading.enough is None:
        raise TypeError("a streaming dataset may have no end: pass a list, [row['text'] for row in dataset.take(n)]")
    column, is_chat = text_column(table, column)
    values: Iterable[Any] = (row[column] for row in table) if streams else column_values(table, column, reading)
    if is_chat:
        values = (conversation(value, column, reading.tokenizer) for value in values)
    return until(values, reading.enough if streams else None)


def fitting_split(tables: dict[str, Any], split: str) -> Any:
    wanted = [split] if split == "train" else ["test", "validation"]
    present = [name for name in wanted if name in tables]
    if not present:
        raise ValueError(f"a dataset with the split {' or '.join(map(repr, wanted))} is needed, got {sorted(tables)}")
    return tables[present[0]]


def text_column(table: Any, wanted: str | None) -> tuple[str, bool]:
    """(the column to read, whether it holds conversations)."""
    first: dict[str, Any] = next(iter(table), {})
    features = table.features or {}
    names = list(table.column_names or first)
    strings = [
        name
        for name in names
        if isinstance(first.get(name), str) or getattr(features.get(name), "dtype", "") in ("string", "large_string")
    ]
    chats = [name for name in names if is_conversation(first.get(name))]
    held = f"it has {names}, of which {strings} hold strings and {chats} conversations"
    if wanted is not None:
        if wanted not in strings + chats:
            raise ValueError(f"the dataset has no column {wanted!r} of text; {held}")
        return wanted, wanted in chats
    if "text" in strings:
        return "text", False
    if len(chats) == 1:
        return chats[0], True
    if len(strings) == 1:
        return strings[0], False
    raise ValueError(
        f'the dataset needs a "text" column, or exactly one column of strings; {held}. Name it, "file:column" or '
        '"owner/name:column", or pass a list, dataset[column][:]'
    )


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages, `{"role": ..., "content": ...}`."""
    messages = value if isinstance(value, list) else []
    return bool(messages) and all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in messages)


def conversation(messages: Any, column: str, tokenizer: Any) -> str:
    """The conversation as one text."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the column {column!r} holds conversations, and "
            + ("no tokenizer was given" if tokenizer is None else f"{type(tokenizer).__name__} has no chat template")
            + ": use the tokenizer of a chat model, or name a column of text"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False)


def column_values(table: Any, column: str, reading: Reading) -> list[Any]:
    """Those of blocks of rows in a random order, until they are enough; in the order of the table."""
    blocks = range(0, len(table), ROWS_PER_READ)
    generator = torch.Generator().manual_seed(reading.seed)
    read: dict[int, list[Any]] = {}
    characters = 0
    for block in torch.randperm(len(blocks), generator=generator).tolist():
        if reading.enough is not None and characters >= reading.enough:
            break
        start = blocks[block]
        read[block] = table[start : start + ROWS_PER_READ][column]
        characters += sum(map(size, read[block]))
    return [value for block in sorted(read) for value in read[block]]


def size(value: Any) -> int:
    """Characters of a document or a conversation."""
    return len(value) if isinstance(value, str) else sum(len(str(one)) for one in value or [])


def until(documents: Iterable[Any], enough: int | None) -> list[str]:
    """The leading documents that have this many characters together; all if None.

    Raises:
        TypeError: for a document that is no string.
    """
    taken: list[str] = []
    characters = 0
    for document in documents:
        if enough is not None and characters >= enough:
            break
        if not isinstance(document, str):
            raise TypeError(f"documents must be strings, number {len(taken)} is a {type(document).__name__}")
        taken.append(document)
        characters += len(document)
    return taken
