"""Batches as a caller gives them, checked before anything runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_blr.calibration.calls import Batch

EXPECTED = (
    'a list of batches, each token ids [B, T] or a dict of tensors, {"input_ids": ids, ...}, a data set of images or '
    "sounds, or a folder of images"
)
FOR_TEXT = "give text as BLRConfig(dataset=[text, ...]) with tokenizer="


def given_batches(calibration: Iterable[Batch | Tensor] | str | Path) -> list[Batch]:
    """The batches as dicts of the model's keyword arguments.

    Raises:
        TypeError: for anything but tensors and dicts of tensors, one at a time.
        ValueError: for no batch at all, and for token ids that are no integers of shape `[B, T]`.
    """
    given: Any = calibration
    if torch.is_tensor(given) and given.dim() < 3:
        raise ValueError(
            f"calibration= takes {EXPECTED}; got one tensor of shape {list(given.shape)}: "
            "give a list of it, [ids], or several batches, ids.split(8)"
        )
    if isinstance(given, Mapping):
        raise TypeError(f"calibration= takes {EXPECTED}; got one {type(given).__name__}: give a list of it, [batch]")
    if isinstance(given, str):
        raise TypeError(f"calibration= takes {EXPECTED}; got a string: {FOR_TEXT}")
    if not isinstance(given, Iterable):
        raise TypeError(f"calibration= takes {EXPECTED}; got a {type(given).__name__}: give a list of batches")
    batches = [given_batch(number, batch) for number, batch in enumerate(given)]
    if not batches:
        raise ValueError("calibration= holds no batch; give at least one, or leave it out to fit the weights alone")
    return batches


def given_batch(number: int, batch: Any) -> Batch:
    """One of them; `number` is for the message."""
    where = f"calibration= takes {EXPECTED}; batch {number}"
    if torch.is_tensor(batch):
        if batch.is_floating_point():
            raise ValueError(
                f"{where} holds numbers of {batch.dtype}, which are no token ids: "
                'give a dict that names the argument, {"pixel_values": x}'
            )
        batch = {"input_ids": batch}
    if isinstance(batch, str):
        raise TypeError(f"{where} is a string: {FOR_TEXT}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where} is a {type(batch).__name__}: give torch.tensor(ids), of shape [B, T]")
    for key, value in batch.items():
        if isinstance(value, str):
            raise TypeError(f"{where} holds text under {key!r}: {FOR_TEXT}")
        if not torch.is_tensor(value):
            raise TypeError(
                f"{where} holds {key!r} as a {type(value).__name__}: give a tensor with one row for each sequence, as "
                'tokenizer(texts, return_tensors="pt", padding=True) does'
            )
    ids = batch.get("input_ids")
    if ids is not None and ids.dim() < 2:
        raise ValueError(f"{where} holds token ids of shape {list(ids.shape)}: give ids[None] for one sequence")
    return dict(batch)
