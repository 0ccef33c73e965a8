"""From what a caller names or gives to documents."""

from __future__ import annotations

import os
from typing import Any

from hf_blr.config.texts import describe, is_mixture, known_names, needs_writing
from hf_blr.text.named import NAMED
from hf_blr.text.places import read_place
from hf_blr.text.tables import Reading, read_table, until

SPLITS = ("train", "test")


def load_text(
    dataset: Any, split: str, tokenizer: Any = None, *, enough: int | None = None, seed: int = 0
) -> list[str]:
    """The documents of a dataset.

    Args:
        dataset: one of

            - "builtin": the reference documentation that comes with CPython (some 0.46 million characters, a
              little different in each Python version). Its topics in alphabetical order: the first 88 % of
              the characters to train, the rest to test. Needs no hub.
            - "wikitext2": WikiText-2 raw, line by line, from the hub's Salesforce/wikitext.
            - "c4": leading documents of allenai/c4's first English shard; its validation split is the test
              split.
            - a path: a text file, or a folder whose .txt, .md, .rst and .text files are read in alphabetical
              order, subfolders included. The same text for every split.
            - "file.jsonl", "file.csv", "file.parquet" or the hub id "owner/name", each with an optional ":column".
            - a list of strings: the documents, for every split.
            - a `datasets.Dataset` or `IterableDataset`, for every split; of a dictionary of them the split asked for
              ("validation" if there is no "test").

            Of tables the column that is named is read; else "text", the only one of conversations (lists of
            `{"role", "content"}`), or the only one of strings.
        split: "train" or "test".
        tokenizer: its chat template turns conversations into text; else it is not used.
        enough: characters from which on no more is read of a table (blocks of rows in a random order) or a stream (in
            its own order); None reads all.
        seed: of that random order.

    Raises:
        ValueError: for an unknown name, a path where nothing is, text without a single letter, a table
            without a clear text column, conversations without a chat template, or text that has no documents because a
            model is to write it.
        TypeError: for any other kind of dataset, and for a stream that is to be read to its end.
        ImportError: if a table or hub dataset is asked for and `datasets` is not installed.
        ConnectionError: if the hub cannot be reached and has nothing in its local cache.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    reading = Reading(split, tokenizer, enough, seed)
    if isinstance(dataset, os.PathLike):
        dataset = os.fspath(dataset)
    if is_mixture(dataset) or needs_writing(dataset):
        raise ValueError(
            f"{describe(dataset)} has no documents to read: take windows of it with hf_blr.text.load_windows, and name "
            "one text where perplexity is measured"
        )
    if isinstance(dataset, str):
        documents = until(NAMED[dataset](split), enough) if dataset in NAMED else read_place(dataset, reading)
    elif isinstance(dataset, (list, tuple)):
        documents = until(dataset, None)
    elif hasattr(dataset, "column_names"):
        documents = read_table(dataset, reading)
    else:
        raise TypeError(
            f"dataset must be a name ({known_names()}), a path, a list of strings or a datasets.Dataset, "
            f"got {type(dataset).__name__}"
        )
    if not any(document.strip() for document in documents):
        raise ValueError(f"there is no text in {describe(dataset)} ({len(documents)} documents, all of them empty)")
    return documents
