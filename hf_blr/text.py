"""Where text comes from, and how it becomes windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

SPLITS = ("train", "test")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
#: the share of the built-in text that is for training
BUILTIN_TRAIN = 0.88
#: leading documents of C4's first shard; some 900 thousand tokens to train on, the customary 1100 documents
#: to test on
C4_DOCUMENTS = {"train": 2000, "test": 1100}

#: text (and keywords) -> an encoding with "input_ids": a tokenizer of transformers, or what behaves like one
Tokenizer = Callable[..., Any]


def load_text(dataset: Any, split: str) -> list[str]:
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
            - a list of strings: the documents, for every split.
            - a `datasets.Dataset` with a "text" column or exactly one column of strings, for every split; of
              a `DatasetDict` the split asked for ("validation" if there is no "test").
        split: "train" or "test".

    Raises:
        ValueError: for an unknown name, a path where nothing is, text without a single letter, or a table
            without a clear text column.
        TypeError: for any other kind of dataset.
        ImportError: if a hub dataset is asked for and `datasets` is not installed.
        ConnectionError: if the hub cannot be reached and has nothing in its local cache.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    if isinstance(dataset, os.PathLike):
        dataset = os.fspath(dataset)
    if isinstance(dataset, str):
        documents = NAMED[dataset](split) if dataset in NAMED else read_path(dataset)
    elif isinstance(dataset, (list, tuple)):
        documents = check_strings(dataset)
    elif hasattr(dataset, "column_names"):
        documents = read_table(dataset, split)
    else:
        raise TypeError(
            f"dataset must be a name ({known_names()}), a path, a list of strings or a datasets.Dataset, "
            f"got {type(dataset).__name__}"
        )
    if not any(document.strip() for document in documents):
        raise ValueError(f"there is no text in {describe(dataset)} ({len(documents)} documents, all of them empty)")
    return documents


def builtin_text(split: str) -> list[str]:
    # a generated module of half a megabyte: imported only where it is wanted
    from pydoc_data.topics import topics

    boundary = BUILTIN_TRAIN * sum(map(len, topics.values()))
    before = 0
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for name in sorted(topics):
        # a topic goes to the side on which its middle lies, so the cut is the topic boundary nearest to 88 %
        parts["train" if before + len(topics[name]) / 2 <= boundary else "test"].append(topics[name])
        before += len(topics[name])
    return parts[split]


def wikitext2(split: str) -> list[str]:
    return [row["text"] for row in load_from_hub("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)]


def c4(split: str) -> list[str]:
    hub_split = {"train": "train", "test": "validation"}[split]
    shard = f"en/c4-{hub_split}.00000-of-{'01024' if split == 'train' else '00008'}.json.gz"
    rows = load_from_hub("c4", "allenai/c4", data_files={hub_split: shard}, split=hub_split, streaming=True)
    return [row["text"] for row in rows.take(C4_DOCUMENTS[split])]


NAMED = {"builtin": builtin_text, "c4": c4, "wikitext2": wikitext2}


def load_from_hub(name: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, with errors that say what works without it."""
    instead = f'What works without it: {name!r} from its cache, "builtin", a text file or folder, a list of strings'
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"dataset {name!r} needs `pip install datasets`. {instead}.") from error
    try:
        return load_dataset(*args, **kwargs)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(f"dataset {name!r} could not be read from the hub: {error}. {instead}.") from error


def read_path(path: str) -> list[str]:
    """The text of a file, or of each text file in a folder."""
    root = Path(path).expanduser()
    try:
        is_folder, is_file = root.is_dir(), root.is_file()
    except (OSError, ValueError):
        # no name of a file at all: too long, or with a zero byte
        is_folder = is_file = False
    if is_folder:
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"the folder {path!r} holds no file ending in {', '.join(TEXT_SUFFIXES)}")
    elif is_file:
        files = [root]
    else:
        shown = path if len(path) <= 80 else path[:80] + "..."
        raise ValueError(
            f"{shown!r} is neither the name of a dataset ({known_names()}) nor a file or folder here; "
            "text itself is given as a list of strings, [text]"
        )
    return [read_file(file) for file in files]


def read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text: {error}") from error


def read_table(table: Any, split: str) -> list[str]:
    """The text column of a `datasets.Dataset`, or of the fitting split of a `DatasetDict`."""
    if isinstance(table, dict):
        wanted = [split] if split == "train" else ["test", "validation"]
        present = [name for name in wanted if name in table]
        if not present:
            raise ValueError(
                f"a dataset with the split {' or '.join(map(repr, wanted))} is needed, got {sorted(table)}"
            )
        table = table[present[0]]
    if not hasattr(table, "__len__"):
        raise TypeError("a streaming dataset may have no end: pass a list, [row['text'] for row in dataset.take(n)]")
    names = table.column_names
    of_strings = [name for name in names if getattr(table.features[name], "dtype", "") in ("string", "large_string")]
    if "text" in of_strings:
        column = "text"
    elif len(of_strings) == 1:
        column = of_strings[0]
    else:
        raise ValueError(
            f'the dataset needs a "text" column, or exactly one column of strings; it has {names}, of which '
            f"{of_strings} hold strings. Pass a list, dataset[column][:], or rename the column"
        )
    return check_strings(table[column][:])


def check_strings(documents: Iterable[str]) -> list[str]:
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(f"documents must be strings, number {index} is a {type(document).__name__}")
    return list(documents)


def known_names() -> str:
    return ", ".join(f'"{name}"' for name in sorted(NAMED))


def describe(dataset: Any) -> str:
    """A dataset in a few words, for messages and reports."""
    if isinstance(dataset, (str, os.PathLike)):
        return os.fspath(dataset)
    return f"<{type(dataset).__name__} of {len(dataset)} texts>"


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Token ids `[T]` of the documents joined by two newlines and tokenised once, as GPTQ and its successors
    do.

    A tokenizer that opens each text with a beginning-of-sequence token does so once, at the very start.
    """
    if isinstance(documents, str):
        raise TypeError("tokenize takes a list of strings; for one string pass [text]")
    # verbose=False: the text is cut into windows later, its length says nothing
    return torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"], dtype=torch.long)


def sample_windows(tokens: torch.Tensor, seqlen: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    """Windows `[n, seqlen]` of consecutive tokens that do not overlap, in the order of the text.

    Args:
        tokens: ids `[T]`.
        seqlen: tokens in a window.
        num_samples: the most windows to return. If the text has more, a random choice of them that `seed`
            decides.

    Raises:
        ValueError: if the text is shorter than one window, or a count is not positive.
    """
    if seqlen < 1 or num_samples < 1:
        raise ValueError(f"seqlen and num_samples must be at least 1, got {seqlen} and {num_samples}")
    available = len(tokens) // seqlen
    if available == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for one window of seqlen={seqlen}; "
            f"use a seqlen of at most {len(tokens)}, or more text"
        )
    windows = tokens[: available * seqlen].view(available, seqlen)
    if available > num_samples:
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
        windows = windows[chosen.sort().values]
    return windows
