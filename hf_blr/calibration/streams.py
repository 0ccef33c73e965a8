"""Which stream of positions each layer of a model reads: tokens, what a decoder is fed, frames of sounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch, first, hooked, run
from hf_blr.calibration.padding import DECODED, FRAMES, TOKENS, UNMASKED, has_decoder, real_positions

#: {layer or block: the positions `[B, T]`, bool, of what it reads that count}; all do for those that are not in it
Masks = dict[str, Tensor]


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
