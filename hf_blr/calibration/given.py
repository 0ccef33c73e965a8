"""Batches as a caller gives them, checked before anything runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.padding import token_count

EXPECTED = (
    'a list of batches, each token ids [B, T] or a dict of tensors, {"input_ids": ids, ...}, a data set of images or '
    "sounds, or a folder of images"
)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FOR_TEXT = "give text as BLRConfig(dataset=[text, ...]) with tokenizer="


def given_batches(calibration: Iterable[Batch | Tensor] | str | Path) -> list[Batch]:
    """The batches as dicts of the model's keyword arguments.

    Raises:
        TypeError: for anything but tensors and dicts of tensors, one at a time.
        ValueError: for no batch at all, token ids that are no integers of shape `[B, T]`, a mask of another shape, and
            masks that hide every token.
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
    if all("input_ids" in batch for batch in batches) and not token_count(batches):
        raise ValueError("calibration= holds no token: each attention_mask hides all of its batch, or is it inverted?")
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
        if batch.dim() > 2:
            raise ValueError(f"{where} holds token ids of shape {list(batch.shape)}: give [B, T], B sequences of T")
        batch = {"input_ids": batch}
    if isinstance(batch, str):
        raise TypeError(f"{where} is a string: {FOR_TEXT}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where} is a {type(batch).__name__}: give torch.tensor(ids), of shape [B, T]")
    if not batch:
        raise ValueError(f"{where} is empty: leave it out, or give it input_ids")
    for key, value in batch.items():
        if isinstance(value, str):
            raise TypeError(f"{where} holds text under {key!r}: {FOR_TEXT}")
        if not torch.is_tensor(value):
            raise TypeError(
                f"{where} holds {key!r} as a {type(value).__name__}: give a tensor with one row for each sequence, as "
                'tokenizer(texts, return_tensors="pt", padding=True) does'
            )
    check_tokens(where, batch)
    return dict(batch)


def check_tokens(where: str, batch: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the ids are none, or the mask is not one of them."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return
    shape = list(ids.shape)
    if ids.dim() < 2:
        raise ValueError(f"{where} holds token ids of shape {shape}: give ids[None] for one sequence")
    if not ids.numel():
        raise ValueError(f"{where} holds token ids of shape {shape}: leave it out, or give it a token")
    if ids.dtype not in INTEGERS:
        raise ValueError(f"{where} holds token ids as {ids.dtype}: give integers, as torch.int64")
    # one of more dimensions says what sees what
    if mask is not None and (mask.dim() < 2 or mask.dim() == ids.dim() == 2 and mask.shape != ids.shape):
        raise ValueError(
            f"{where} holds an attention_mask of shape {list(mask.shape)} for token ids of shape {shape}: "
            "give it their shape"
        )
