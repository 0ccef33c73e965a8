"""The model card of a compressed model: its README.md, of which one section is ours."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_blr.atomic import write_text_atomically
from hf_blr.checkpoint.origin import public_name
from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.config.texts import describe
from hf_blr.markdown import format_table
from hf_blr.plan import plan_from_layers
from hf_blr.plan.rows import stored_rows

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

CARD = "README.md"
BEGIN, END = "<!-- hf_blr: written anew at each save -->", "<!-- end of hf_blr -->"
#: fields that say how a model was compressed, and not what came of it
OUTCOMES = ("layers", "origin", "version", "quant_method")


def write_card(
    folder: Path, config: PreTrainedConfig, name: str | None = None, scores: list[dict] | None = None
) -> None:
    """Write the folder's README.md, or put our section and metadata into the one that is there.

    Text and metadata of somebody else stay as they are. A card whose metadata cannot be read stays whole, with a
    warning.

    Args:
        folder: of a saved model.
        config: of the model, with our `quantization_config`.
        name: by which others will load it; the folder's if left out.
        scores: rows of a table of what was measured, in place of those that the config knows.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = folder / CARD
    stored: Any = config.quantization_config
    blr = BLRConfig(**stored) if isinstance(stored, dict) else stored
    section = "\n".join([BEGIN, *section_lines(folder, config, blr, name or folder.resolve().name, scores), END])
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        # the reader warns of a card without metadata
        card = ModelCard(text if text.startswith("---") else "---\n{}\n---\n" + text)
    except (ValueError, YAMLError) as error:
        logger.warning("%s: its metadata cannot be read (%s), so the card is left as it is", path, error)
        return
    old = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", card.text, re.DOTALL)
    if old:
        card.text = card.text[: old.start()] + section + card.text[old.end() :]
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    add_metadata(card, (blr.origin or {}).get("base_model"))
    write_text_atomically(path, str(card))


def add_metadata(card: ModelCard, base_model: str | None) -> None:
    """Our tag, and library and base model where the card names none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    data: Any = card.data
    tags = data.tags or []
    data.tags = tags if QUANT_METHOD in tags else [*tags, QUANT_METHOD]
    data.library_name = data.library_name or "transformers"
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return
    # a name without an owner is a folder's, but for a few old models
    if "/" in str(base_model):
        data.base_model = data.base_model or base_model


def section_lines(
    folder: Path, config: PreTrainedConfig, blr: BLRConfig, name: str, scores: list[dict] | None
) -> list[str]:
    """What the model is, how large, what it lost, how to load it and how it was made."""
    # a line break of a stranger's would begin a text of its own
    origin = {
        key: " ".join(fact.split()) if isinstance(fact, str) else fact for key, fact in (blr.origin or {}).items()
    }
    # saving leaves its name there
    dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    rows, summary = stored_rows(plan_from_layers(blr.layers or {}), dtype or torch.float32)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model_class = (config.architectures or ["AutoModel"])[0]
    base = origin.get("base_model")
    lines = [
        "## Block low-rank layers",
        "",
        f"{f'`{base}`' if base else 'A model'} with linear layers replaced by block low-rank ones, by hf_blr.",
        "",
        format_table(rows),
        "",
        f"{summary}. The weight files have {weights / 1e6:.1f} MB.",
        *measured_lines(origin, scores),
        "",
        "### Load it",
        "",
        "```sh",
        "pip install hf-blr",
        "```",
        "",
        "```python",
        "import hf_blr  # before the model is loaded",
        f"from transformers import {model_class}",
        "",
        f"model = {model_class}.from_pretrained({name!r})",
        "```",
        "",
        "### How it was made",
        "",
    ]
    for command in filter(None, (origin.get("command"), origin.get("trained"))):
        lines += ["```sh", command, "```", ""]
    return [*lines, f"`BLRConfig({arguments(blr)})`, fitted to {fitted_to(blr, origin)}."]


def arguments(blr: BLRConfig) -> str:
    """What was asked for, as it would be written elsewhere; what is as by default is left out."""
    defaults = BLRConfig(layers={}, ratio=1).to_dict()
    asked = {key: value for key, value in blr.to_dict().items() if key not in OUTCOMES and value != defaults[key]}
    if isinstance(blr.dataset, str):
        asked["dataset"] = public_name(blr.dataset)
    return ", ".join(f"{key}={value!r}" for key, value in ({"structure": blr.structure} | asked).items())


def fitted_to(blr: BLRConfig, origin: dict[str, Any]) -> str:
    """The weights, or how much of which text, as far as that is known."""
    tokens = origin.get("calibration_tokens")
    text = f" of {public_name(describe(blr.dataset))}" if blr.calibrated else ""
    return f"{tokens} tokens{text}" if tokens else origin.get("fitted_to", "the weights")


def measured_lines(origin: dict[str, Any], scores: list[dict] | None) -> list[str]:
    """The divergence that the compression reported, and a table of scores; none of what was not measured."""
    lines = []
    if origin.get("divergence") is not None:
        lines = [
            "",
            f"When it was compressed, it was {origin['divergence']:.4f} nats a token from the dense model (mean "
            f"Kullback-Leibler divergence) on {origin['held_out_tokens']} tokens that no fit saw. Later training or "
            "rounding is not in this number.",
        ]
    rows = scores or origin.get("scores")
    return [*lines, "", format_table(rows)] if rows else lines
