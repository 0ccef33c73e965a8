"""What the field `dataset` may hold, in words, in a checkpoint and on the command line."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

#: text that the dense model writes itself, as documents and as conversations
SELF, SELF_CHAT = "self", "self:chat"
WRITTEN = (SELF, SELF_CHAT)
#: the names that stand for a text
TEXTS = ("builtin", "c4", SELF, SELF_CHAT, "wikitext2")

#: what `dataset="default"` stands for: a name or a mixture; and for a model that would have to write and cannot
DEFAULT = "default"
DEFAULT_TEXT: str | dict[str, float] = SELF
DEFAULT_WITHOUT_WRITING = "builtin"


def known_names() -> str:
    return ", ".join(f'"{name}"' for name in TEXTS)


def is_mixture(dataset: Any) -> bool:
    """Whether it is {source: share}; a `datasets.DatasetDict` is none."""
    return isinstance(dataset, Mapping) and not hasattr(dataset, "column_names")


def needs_writing(dataset: Any) -> bool:
    """Whether the model has to write the text, or a part of it."""
    if is_mixture(dataset):
        return any(name in WRITTEN for name in dataset)
    return isinstance(dataset, str) and dataset in WRITTEN


def check_dataset(dataset: Any, planned: bool) -> None:
    """Raises ValueError for what can be no calibration text.

    planned: the config is that of a finished compression; its files may lie on another machine.
    """
    if is_mixture(dataset):
        check_mixture(dataset, planned)
    elif not (dataset is None or isinstance(dataset, (str, list, tuple)) or hasattr(dataset, "column_names")):
        raise ValueError(
            "dataset must be None, a name, a path, a mixture {source: share}, a list of strings or a "
            f"datasets.Dataset, got {type(dataset).__name__}"
        )


def check_mixture(shares: Mapping[Any, Any], planned: bool) -> None:
    if not shares:
        raise ValueError('a mixture must name at least one source, {"self": 0.5, "wikitext2": 0.5}; got {}')
    for name, share in shares.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not (number and 0 < share < math.inf):
            raise ValueError(f"the share of {name!r} in a mixture must be a positive number, got {share!r}")
        if not isinstance(name, str) or name == DEFAULT:
            raise ValueError(f"a source of a mixture must be a name or a path, got {name!r}")
        # what has a slash or an ending may be a file, or a dataset of the hub
        if not (planned or name in TEXTS or "/" in name or "." in name or os.path.exists(name)):
            raise ValueError(
                f"{name!r} in a mixture is neither the name of a text ({known_names()}) nor a file or folder here"
            )


def stored_dataset(dataset: Any) -> Any:
    """The JSON-ready form: names, paths and mixtures as they are; text in memory described, not kept."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    return dict(dataset) if is_mixture(dataset) else describe(dataset)


def describe(dataset: Any) -> str:
    """A dataset in a few words, for messages and reports."""
    if isinstance(dataset, (str, os.PathLike)):
        return os.fspath(dataset)
    if is_mixture(dataset):
        total = sum(dataset.values())
        return ", ".join(f"{100 * share / total:.3g} % {name}" for name, share in dataset.items())
    size = f" of {len(dataset)} texts" if hasattr(dataset, "__len__") else ""
    return f"<{type(dataset).__name__}{size}>"


def dataset_from(text: str) -> str | dict[str, float]:
    """What the command line means: a name, a path, or the mixture `self=0.5,wikitext2=0.5`.

    Raises:
        ValueError: for a mixture with a part that is no NAME=SHARE, or one name twice.
    """
    if "=" not in text or os.path.exists(text):
        return text
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().rpartition("=")
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if not name or math.isnan(number) or name in shares:
            raise ValueError(f"a mixture is written NAME=SHARE,NAME=SHARE with each name once; {part!r} is wrong there")
        shares[name] = number
    return shares
