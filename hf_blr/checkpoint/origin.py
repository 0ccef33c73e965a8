"""What a compressed model says of where it came from and of what was measured on it; its model card shows it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def record_origin(models: list[PreTrainedModel], **facts: Any) -> None:
    """Add to what the configs of these models say, by which BLR modules are saved.

    Args:
        models: of `holders`, whose plans are recorded.
        facts: `base_model`, `command`, `trained` (a command too), `scores` (rows of a table), and of a report
            `fitted_to`, `calibration_tokens`, `divergence` and `held_out_tokens`. One that is None is left out.
    """
    for holder in models:
        stored: Any = holder.config.quantization_config
        known = {name: fact for name, fact in facts.items() if fact is not None}
        stored.origin = {**(stored.origin or {}), **known}


def base_name(model: nn.Module) -> str | None:
    """What a model was loaded from: a hub id, or a folder's name."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return public_name(name) if name else None


def public_name(name: str) -> str:
    """A path of this machine without the folders around it; anything else as it is."""
    return os.path.basename(os.path.abspath(name)) if os.path.exists(name) or os.path.isabs(name) else name


def public_command(words: Iterable[str]) -> str:
    """A command line as it would be typed elsewhere."""
    return shlex.join(["hf-blr", *map(public_name, words)])


def score_row(name: str, score: dict[str, Any]) -> dict[str, Any]:
    """A perplexity as a row of the card's table. score: of `Perplexity.to_dict`."""
    return {
        "model": name,
        "perplexity": score["ppl"],
        "text": public_name(score["dataset"]),
        "tokens": score["n_tokens"],
        "window": score["seqlen"],
        "stride": score["stride"],
    }
