"""Errors of tensors whose shapes are not those of the model, with their names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_blr.checkpoint.files import stored_tensors, weight_files
from hf_blr.checkpoint.folder import is_ours
from hf_blr.checkpoint.verify import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def naming_shapes(cls: type[PreTrainedModel], folder: Path) -> Iterator[None]:
    """Inside the `with`, a load: for tensors of a compressed checkpoint that have other shapes, ValueError names them.

    transformers names them in its log alone. Which shapes are right is known to the class and the config: with
    `ignore_mismatched_sizes` others may be, and then it raises nothing.
    """
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or not is_ours(json.loads((folder / "config.json").read_text())):
            raise
        config_class: Any = cls.config_class
        with torch.device("meta"):
            model = cls(config_class.from_pretrained(folder))
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        wrong = [
            f"{key} (shape {shape}, the config says {wanted[key]})"
            for key, shape, _ in stored_tensors(weight_files(folder))
            if wanted.get(key, shape) != shape
        ]
        if not wrong:
            raise
        raise ValueError(
            f"{wrong[0].partition(' ')[0]}: the checkpoint does not fit its own config. "
            + describe("Tensors of another shape", wrong)
            + "Load it with the config.json that was saved with it"
        ) from error
