"""The calibration text as batches, and what the dense model's layers do on it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.blockwise import whole_model_grams
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics, fisher_statistics
from hf_blr.calibration.given import given_batches
from hf_blr.calibration.losses import NoLoss
from hf_blr.calibration.media import holds_media, media_batches
from hf_blr.calibration.padding import token_count
from hf_blr.calibration.pieces import in_pieces, joined, put_away
from hf_blr.calibration.store import Store
from hf_blr.config import BLRConfig
from hf_blr.config.checks import check_unturned
from hf_blr.experts import expanded, opened
from hf_blr.modes import evaluating
from hf_blr.plan import Plan, check_kinds, check_plan, resolve_plan
from hf_blr.processes import ALONE, Processes
from hf_blr.targets import refuse_adapters, unwrapped
from hf_blr.text import Tokenizer, load_windows, reads_text
from hf_blr.text.windows import check_ids, check_tokenizer

logger = logging.getLogger(__name__)

#: tokens of one calibration forward: enough to fill a GPU, and a small part of the model's own memory
TOKENS_PER_FORWARD = 16384
#: windows held out of the fits, as a share of those that are fitted to
HELD_OUT = 1 / 16
#: tokens from which on a tokenizer's longest text says that there is no longest one
NO_LIMIT = 10**9


def collect_statistics(
    model: nn.Module,
    config: BLRConfig,
    *,
    tokenizer: Tokenizer | None = None,
    calibration: Iterable[Batch | Tensor] | str | Path | None = None,
    store: Store | None = None,
) -> Statistics:
    """The dense model's statistics on the calibration text, all layers in memory at once; see `Statistics`.

    Experts of one tensor share theirs, since a matrix for each would be too much to hold at once.

    Args:
        model, config, tokenizer, calibration: as for `compress`. With `config.fisher` the text takes a forward and a
            backward pass, else a forward.
        store: with a limit, the matrices are gathered part by part and lie in its files, for as long as it is open.

    Raises:
        TypeError: as `compress` does.
        ValueError: likewise, and if neither the config nor `calibration` names a text.
    """
    check_kinds(model, config)
    model = unwrapped(model)
    refuse_adapters(model)
    check_unturned(config)
    plan = resolve_plan(model, config)
    check_plan(model, plan)
    batches, _ = calibration_batches(model, config, tokenizer, calibration)
    if not batches:
        raise ValueError("statistics need text: set BLRConfig(dataset=...) or pass calibration=")
    return statistics_of(model, plan, batches, config, store)


def statistics_of(
    model: nn.Module,
    plan: Plan,
    batches: list[Batch],
    config: BLRConfig,
    store: Store | None = None,
    processes: Processes = ALONE,
) -> Statistics:
    """Those of the plan's layers; without Fisher matrices if nothing weighs them and the config can do without."""
    store = store or Store()
    with opened(model, plan):
        labels = expanded(model, plan)
        if config.fisher:
            try:
                return fisher_statistics(model, list(labels), batches, config.seed, labels, store, processes)
            except NoLoss as error:
                if config.allocation == "loss":
                    raise
                logger.warning("%s; here all outputs weigh alike and all layers keep the same ratio", error)
        found = []
        with evaluating(model):
            for piece in in_pieces(model, list(labels), labels, store.limit, output_grams=False):
                grams = whole_model_grams(model, piece, batches, labels, processes)
                unreached = {labels[name] for name in piece} - set(grams)
                part = Statistics(grams, {}, token_count(batches), frozenset(unreached), grams.rows)
                found.append(part if store.limit is None else put_away(part, store))
    return found[0] if len(found) == 1 else joined(found)


def calibration_batches(
    model: nn.Module,
    config: BLRConfig,
    tokenizer: Tokenizer | None,
    calibration: Iterable[Batch | Tensor] | str | Path | None,
    progress: bool = True,
) -> tuple[list[Batch], list[Batch]]:
    """The batches to fit to, and those of the config's text that no fit sees, on the model's device.

    Both are empty for a fit to the weights alone. Batches that a caller gives are all fitted to.
    """
    held_out: list[Batch] = []
    device = device_of(model)
    if calibration is not None:
        if holds_media(calibration):
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            batches = media_batches(calibration, tokenizer, config.num_samples, config.seed, dtype)
        else:
            batches = given_batches(calibration)
    elif not config.calibrated:
        return [], []
    else:
        if not reads_text(model):
            raise ValueError(
                f"{type(model).__name__} does not run on text alone, such as dataset={config.to_dict()['dataset']!r}: "
                "pass calibration=, or set dataset=None to fit the weights alone"
            )
        if tokenizer is None:
            raise ValueError(
                f"fitting to dataset={config.to_dict()['dataset']!r} needs a tokenizer: pass tokenizer=, or set "
                "dataset=None to fit the weights alone"
            )
        check_tokenizer(tokenizer)
        seqlen = min(config.seqlen, *longest_windows(model, tokenizer))
        count = config.num_samples + int(HELD_OUT * config.num_samples)
        windows = load_windows(config.dataset, model, tokenizer, seqlen, count, config.seed, progress=progress)
        fitted, apart = set_apart(windows, config.num_samples)
        batches = [text_batch(model, part) for part in fitted.split(max(1, TOKENS_PER_FORWARD // seqlen))]
        held_out = [text_batch(model, window[None]) for window in apart]
    for batch in (*batches, *held_out):
        # beside images or sounds, an id may only say where those belong
        if "input_ids" in batch and not any(value.is_floating_point() for value in batch.values()):
            check_ids(model, batch["input_ids"])
    return on_device(batches, device), on_device(held_out, device)


def text_batch(model: nn.Module, ids: Tensor) -> Batch:
    """Windows `[B, T]` as the model reads them: an encoder has the first half where a decoder can go on."""
    arguments = inspect.signature(model.forward).parameters
    generates = getattr(model, "can_generate", bool)()
    # the labels of an encoder-decoder that classifies are classes
    if "decoder_input_ids" not in arguments or ("labels" in arguments and not generates):
        return {"input_ids": ids}
    written = "labels" if generates else "decoder_input_ids"
    half = ids.shape[1] // 2
    # T5 views its labels as one row
    return {"input_ids": ids[:, :half], written: ids[:, half:].contiguous()}


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: that of its first parameter in memory, or the CPU where all are offloaded."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def set_apart(windows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The windows to fit to, at most so many, and those held out: one of every 17, spread over the text."""
    count = int(HELD_OUT / (1 + HELD_OUT) * len(windows))
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[(torch.arange(count) * len(windows)) // max(count, 1)] = True
    return windows[~held_out][:most], windows[held_out]


def on_device(batches: list[Batch], device: torch.device) -> list[Batch]:
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def longest_windows(model: nn.Module, tokenizer: Tokenizer) -> list[int]:
    """How many tokens a window may have, by all who say so: the model's config, position embeddings, the tokenizer."""
    config: Any = getattr(model, "config", None)
    # a model of text and images keeps the text's numbers apart
    said = [getattr(each, "max_position_embeddings", None) for each in (config, getattr(config, "text_config", None))]
    said.append(getattr(tokenizer, "model_max_length", None))
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module.padding_idx is not None
            and "position" in name.rpartition(".")[2]
        ):
            # RoBERTa and its kin count positions from the one behind the padding's
            said.append(module.num_embeddings - module.padding_idx - 1)
    # some families store -1 or 1 for "no limit", and tokenizers 1e30
    return [limit for limit in said if isinstance(limit, int) and 1 < limit < NO_LIMIT]
