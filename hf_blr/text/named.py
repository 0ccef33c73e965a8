"""Texts that have a name, and how the hub is asked for one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: the share of the built-in text that is for training
BUILTIN_TRAIN = 0.88
#: leading documents of C4's first shard; some 900 thousand tokens to train on, the customary 1100 documents
#: to test on
C4_DOCUMENTS = {"train": 2000, "test": 1100}


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


def c4(split: str) -> Iterable[str]:
    """A stream: its reader stops when it has enough."""
    hub_split = {"train": "train", "test": "validation"}[split]
    shard = f"en/c4-{hub_split}.00000-of-{'01024' if split == 'train' else '00008'}.json.gz"
    rows = load_from_hub("c4", "allenai/c4", data_files={hub_split: shard}, split=hub_split, streaming=True)
    return (row["text"] for row in rows.take(C4_DOCUMENTS[split]))


NAMED = {"builtin": builtin_text, "c4": c4, "wikitext2": wikitext2}


def load_from_hub(name: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, with errors that say what works without it."""
    instead = f'What works without it: {name!r} from its cache, "builtin", a text file or folder, a list of strings'
    try:
        return datasets_for(name).load_dataset(*args, **kwargs)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(f"dataset {name!r} could not be read from the hub: {error}. {instead}.") from error


def datasets_for(name: str) -> Any:
    """The package `datasets`, which this text needs. Raises ImportError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'dataset {name!r} needs `pip install datasets`. What works without it: "builtin", a text file or folder, '
            "a list of strings."
        ) from error
    return datasets
