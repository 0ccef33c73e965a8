"""Positions that a mask hides are no inputs: they fill up a batch, and nobody reads what the model does on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch, first, hooked, run

#: {layer or block: the positions `[B, T]`, bool, of what it reads that count}; all do for those that are not in it
Masks = dict[str, Tensor]

#: whose positions a layer's inputs have: those of the tokens (of an encoder-decoder: the encoder's), those that the
#: decoder is fed, the frames that an audio model cuts its samples into, or some that no mask is about
TOKENS, DECODED, FRAMES, UNMASKED = "tokens", "decoded", "frames", "unmasked"

#: what transformers calls the losses of the next token; it takes a model without a name for its loss to have this one
NEXT_TOKEN = (None, "ForCausalLM", "ForConditionalGeneration")


class Padding:
    """Which positions of a batch count for each layer and block of a model.

    A mask says something of one stream alone, and two streams may have one shape by chance: so each layer is asked
    whose positions it reads. An image or audio tower knows no tokens; a decoder has positions of its own, and where it
    attends to the encoder it reads the encoder's.

    Args:
        model: the model whose forward takes the batches.
        names: of layers and blocks.
        batches: the first shows which layers read what the encoder puts out.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], batches: list[Batch]):
        self.model = model
        self.streams = {name: stream_of(model, name) for name in names}
        decoded = [name for name, stream in self.streams.items() if stream == DECODED]
        if decoded and any(real_positions(batch, model) for batch in batches):
            self.streams |= dict.fromkeys(readers_of_encoder(model, decoded, batches[0]), encoded_stream(model))

    def masks(self, batch: Batch) -> Masks:
        """Those of one batch."""
        real = real_positions(batch, self.model)
        return {name: real[stream] for name, stream in self.streams.items() if stream in real}


def stream_of(model: nn.Module, name: str) -> str:
    """Whose positions a layer or block reads, by where it lies."""
    decoder: Any = model.get_decoder() if has_decoder(model) else None  # type: ignore[operator]
    # a plain module that is handed batches with a mask is taken to read what the mask is for
    found, module = stream_read(model, TOKENS), model
    for part in name.split("."):
        module = module.get_submodule(part)
        found = stream_read(module, found)
        if module is decoder:
            return DECODED
    return found


def stream_read(module: nn.Module, otherwise: str) -> str:
    """What a model or tower of transformers says that it reads; `otherwise` for a module that says nothing."""
    said: Any = getattr(module, "input_modalities", None)
    if said is None:
        return otherwise
    if "text" in said:
        return TOKENS
    return FRAMES if hasattr(module, "_get_feature_vector_attention_mask") else UNMASKED


def encoded_stream(model: nn.Module) -> str:
    """What the encoder of an encoder-decoder reads."""
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    return stream_read(encoder, TOKENS)


def readers_of_encoder(model: nn.Module, names: list[str], batch: Batch) -> list[str]:
    """The layers of a decoder that are handed the very states that the encoder puts out."""
    states: list[Tensor] = []
    readers: list[str] = []
    layers = {name: model.get_submodule(name) for name in names}

    def see(name: str, args: tuple[Any, ...]) -> None:
        if args and any(args[0] is each for each in states):
            readers.append(name)

    encoder: Any = model.get_encoder()  # type: ignore[operator]
    handles = [encoder.register_forward_hook(lambda module, args, out: states.append(first_state(out)))]
    handles += [
        layer.register_forward_pre_hook(lambda module, args, name=name: see(name, args))
        for name, layer in layers.items()
    ]
    with hooked(handles), torch.no_grad():
        run(model, batch)
    return readers


def first_state(output: Any) -> Any:
    """What an encoder puts out for a decoder to read."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else first(output)


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
