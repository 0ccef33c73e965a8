"""Positions that a mask hides are no inputs: they fill up a batch, and nobody reads what the model does on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch

#: whose positions there are: those of the tokens (of an encoder-decoder: the encoder's), those that the
#: decoder is fed, the frames that an audio model cuts its samples into, or some that no mask is about
TOKENS, DECODED, FRAMES, UNMASKED = "tokens", "decoded", "frames", "unmasked"

#: what transformers calls the losses of the next token; it takes a model without a name for its loss to have this one
NEXT_TOKEN = (None, "ForCausalLM", "ForConditionalGeneration")


def real_positions(batch: Batch, model: nn.Module | None = None) -> dict[str, Tensor]:
    """{stream: the positions `[B, T]`, bool, that count}, for the streams of which some do not.

    Tokens: `attention_mask` says it, in the shape of `input_ids`, or of `inputs_embeds` without its last dimension. A
    mask in another form says something else than what is padding, and is left alone.
    What a decoder is fed: `decoder_attention_mask` says it, else the labels: behind the last one that is not -100, none
    counts, since nothing there reaches the model's loss.
    Frames: `attention_mask` says it of the samples, and the model how many frames it makes of so many.
    """
    mask, tokens, embedded = (batch.get(key) for key in ("attention_mask", "input_ids", "inputs_embeds"))
    shape = tokens.shape if tokens is not None else embedded.shape[:-1] if embedded is not None else None
    real = {}
    if mask is not None and mask.dim() == 2 and mask.shape == shape:
        real[TOKENS] = mask.bool()
    if has_decoder(model) and (decoded := decoded_positions(batch)) is not None:
        real[DECODED] = decoded
    if mask is not None and mask.dim() == 2 and shape is None and (frames := frame_positions(model, mask)) is not None:
        real[FRAMES] = frames
    return {stream: positions for stream, positions in real.items() if not positions.all()}


def decoded_positions(batch: Batch) -> Tensor | None:
    """The positions that a decoder is fed and that count, `[B, T]`; None where the batch does not say."""
    if (mask := batch.get("decoder_attention_mask")) is not None:
        return mask.bool()
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2:
        return None
    return (labels != -100).flip(1).cumsum(1).flip(1) > 0


def frame_positions(model: nn.Module | None, mask: Tensor) -> Tensor | None:
    """The frames `[B, T]`, bool, that count for a mask `[B, samples]`; None for models that mask no frames."""
    for module in () if model is None else (model, getattr(model, "base_model", model)):
        to_frames: Any = getattr(module, "_get_feature_vector_attention_mask", None)
        if to_frames is not None:
            length: Any = module._get_feat_extract_output_lengths(torch.tensor(mask.shape[1]))  # type: ignore[operator]
            return to_frames(int(length), mask).bool()
    return None


def has_decoder(model: nn.Module | None) -> bool:
    """Whether the model is an encoder with a decoder of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicted_positions(batch: Batch, model: nn.Module) -> Tensor | None:
    """The positions `[B, T]`, bool, whose predictions count; None where all do.

    Those of the input, or of what a decoder is fed. Where the batch holds labels of positions, those of which the label
    is not -100, as in the model's own loss: a model that predicts the next token has its label one further on.
    """
    real, labels = real_positions(batch, model), batch.get("labels")
    shown = real.get(DECODED) if has_decoder(model) else real.get(TOKENS, real.get(FRAMES))
    ids = batch.get("input_ids")
    if (
        labels is None
        or labels.dim() != 2
        or not (has_decoder(model) or (ids is not None and labels.shape == ids.shape))
    ):
        return shown
    counted = labels != -100
    if not has_decoder(model) and getattr(model, "loss_type", None) in NEXT_TOKEN:
        counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)
    return counted if shown is None else counted & shown


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """`[..., K]` -> the rows that count, `[rows, K]`; all of them where `x` has no row for each position.

    Sequences may lie one behind the other or side by side, and dimensions of one (heads that share a key) in between.
    """
    rows = x.reshape(-1, x.shape[-1])
    if real is None:
        return rows
    sizes, shape = sizes_above_one(x.shape[:-1]), sizes_above_one(real.shape)
    if sizes in (shape, [real.numel()]):
        return rows[real.flatten().to(x.device)]
    if sizes == shape[::-1]:
        return rows[real.T.flatten().to(x.device)]
    return rows


def sizes_above_one(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def token_count(batches: list[Batch]) -> int:
    """The tokens of all batches, without padding; batches of something else, as images, hold none."""
    total = 0
    for batch in batches:
        if "input_ids" in batch:
            real = real_positions(batch).get(TOKENS)
            total += batch["input_ids"].numel() if real is None else int(real.sum())
    return total
