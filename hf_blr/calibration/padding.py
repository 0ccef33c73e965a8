"""Positions that a mask hides are no inputs: they fill up a batch, and nobody reads what the model does on them."""

from __future__ import annotations

from torch import Tensor, nn

from hf_blr.calibration.calls import Batch

#: what an encoder-decoder's second half is fed from
DECODED = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def real_positions(batch: Batch, model: nn.Module | None = None) -> Tensor | None:
    """The positions `[B, T]`, bool, that `attention_mask` shows; None where all of the batch counts.

    Only of models that take tokens: the mask has the shape of `input_ids`, or of `inputs_embeds` without its last
    dimension. A mask in another form says something else than what is padding, and is left alone. So is the mask of an
    encoder-decoder `model` whose two sides have one shape: it says nothing of the decoder's positions, and an input's
    shape does not tell whose it is.
    """
    mask, tokens, embedded = (batch.get(key) for key in ("attention_mask", "input_ids", "inputs_embeds"))
    shape = tokens.shape if tokens is not None else embedded.shape[:-1] if embedded is not None else None
    if mask is None or mask.dim() != 2 or mask.shape != shape:
        return None
    if has_decoder(model) and any(batch[key].shape[:2] == mask.shape for key in DECODED if key in batch):
        return None
    real = mask.bool()
    return None if real.all() else real


def has_decoder(model: nn.Module | None) -> bool:
    """Whether the model is an encoder with a decoder of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicted_positions(batch: Batch, model: nn.Module) -> Tensor | None:
    """The positions `[B, T]` whose predictions count; None where all do.

    Those of the input, but for an encoder-decoder: there -100 among the labels says which do not.
    """
    if not has_decoder(model):
        return batch.get("attention_mask")
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    return mask if mask is not None or labels is None else labels != -100


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """`[..., K]` -> the rows that count, `[rows, K]`; all of them where `x` has no row for each position."""
    rows = x.reshape(-1, x.shape[-1])
    if real is None or (x.shape[:-1] != real.shape and x.shape[:-1] != (real.numel(),)):
        return rows
    return rows[real.flatten().to(x.device)]


def token_count(batches: list[Batch]) -> int:
    """The tokens of all batches, without padding; batches of something else, as images, hold none."""
    total = 0
    for batch in batches:
        if "input_ids" in batch:
            real = real_positions(batch)
            total += batch["input_ids"].numel() if real is None else int(real.sum())
    return total
