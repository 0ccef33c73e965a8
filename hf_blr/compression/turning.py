"""The same model in another basis of its residual stream, in which large numbers are spread over all features.

With an orthogonal Q, a stream x Q in place of x gives the same outputs where what reads the stream is W Q and what
writes to it Q^T W: the root of a mean of squares does not see Q. A norm's weights do, and go into the layers that read
it. As in QuaRot (arXiv 2404.00456): columns that stand out make the scales of their groups large, and all numbers
beside them round badly.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.compression.stream import Stream, find_stream
from hf_blr.compression.stream_trial import plain_tensors, trial_outputs
from hf_blr.dense import dense_weight, is_transposed, stored_bias
from hf_blr.targets import unwrapped

logger = logging.getLogger(__name__)

#: of the outputs' norm, by which a turned model's may differ in float32
TOLERANCE = 1e-3
#: rows of a matrix turned at a time: a large vocabulary's would take gigabytes in float64
ROWS = 1 << 16


def turn_stream(model: nn.Module, seed: int = 0) -> int:
    """Turns a dense language model's residual stream into a random orthogonal basis, in place.

    The model computes the same. Weights of norms that read the stream are one afterwards, and a head that shares its
    matrix with the embedding gets a matrix `[V, D]` of its own: the last norm's weights go into the head alone.

    Args:
        model: dense, of transformers, whose stream is read by linear layers alone, through weighted RMS norms (Llama,
            Mistral, Phi-3, Qwen 2 and 3 and their kin). In any dtype; weights are turned in float64.
        seed: of the basis, which is drawn on the CPU.

    Returns:
        The bytes that the head of its own takes; 0 where it had one.

    Raises:
        ValueError: before anything is changed, by name, for what reads or writes the stream otherwise (layer norms,
            norms of what a layer puts out, routers and experts), or if the model is compressed or partly offloaded.
    """
    return Turn.of(unwrapped(model), seed).apply()


@dataclass(frozen=True)
class Turn:
    """A turn that was tried on random ids, and changes nothing before `apply`.

    basis: Q `[D, D]`, float64, on the CPU.
    """

    model: nn.Module
    stream: Stream
    basis: Tensor

    @classmethod
    def of(cls, model: nn.Module, seed: int) -> Turn:
        """Raises ValueError as `turn_stream` does."""
        stream, before = find_stream(model)
        turn = cls(model, stream, random_basis(stream.size, seed))
        after = trial_outputs(model, stream.vocabulary, turn.tensors_in_trial)
        error = ((after - before).norm() / before.norm()).item()
        # also where it is not a number
        if not error < TOLERANCE:
            suspects = f"; look at {', '.join(stream.inner[:4])}" if stream.inner else ""
            raise ValueError(
                f"the stream of a {type(model).__name__} cannot be turned: its outputs on random ids would change by "
                f"{error:.2g} of their norm, so something reads or writes the stream otherwise than through RMS norms "
                f"and linear layers{suspects}; leave turned out"
            )
        return turn

    def modules(self) -> list[str]:
        """What changes. Layers come before the norm that they read through."""
        return [*self.stream.readers, *self.stream.writers, *self.stream.norms, self.stream.embedding]

    def tensors_in_trial(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        plain = plain_tensors(name, module)
        dtype = next(iter(plain.values())).dtype
        return plain | self.tensors(name, module, dtype, dtype)

    def tensors(self, name: str, module: nn.Module, dtype: torch.dtype, kept: torch.dtype) -> dict[str, Tensor]:
        """{parameter: its turned numbers} of one module, computed in one dtype and given in another."""
        stream = self.stream
        if name in stream.norms:
            return {"weight": torch.ones_like(own(module, "weight"), dtype=kept)}
        if name == stream.embedding:
            return {"weight": self.read(own(module, "weight"), None, dtype, kept)}
        if name in stream.readers:
            gains = own(self.model.get_submodule(stream.readers[name]), "weight")
            return {"weight": as_stored(module, self.read(dense_weight(module), gains, dtype, kept))}
        if name in stream.writers:
            weight, bias = dense_weight(module), stored_bias(module)
            basis = self.basis.to(weight.device, dtype)
            turned = {"weight": as_stored(module, (basis.T @ weight.to(dtype)).to(kept))}
            return turned if bias is None else {**turned, "bias": (bias.to(dtype) @ basis).to(kept)}
        return {}

    def read(self, weight: Tensor, gains: Tensor | None, dtype: torch.dtype, kept: torch.dtype) -> Tensor:
        """W `[N, D]` for a turned stream, with the weights of a norm taken in."""
        basis = self.basis.to(weight.device, dtype)
        gains = None if gains is None else gains.to(weight.device, dtype)
        parts = (part.to(dtype) if gains is None else part.to(dtype) * gains for part in weight.split(ROWS))
        return torch.cat([(part @ basis).to(kept) for part in parts])

    def apply(self) -> int:
        """Turns the model; returns the bytes of heads that have a matrix of their own now."""
        for name in self.stream.tied:
            logger.warning(
                "%s shares its matrix with the embedding; turned it has its own, which takes %.1f MB more",
                name,
                own(self.model.get_submodule(name), "weight").nbytes / 1e6,
            )
        # a stream that is half turned is no model
        with interrupted_later(), torch.no_grad():
            for name in self.stream.tied:
                untie(self.model, name)
            for name in self.modules():
                module = self.model.get_submodule(name)
                kept = own(module, "weight").dtype
                for key, tensor in self.tensors(name, module, torch.float64, kept).items():
                    own(module, key).copy_(tensor)
        return sum(own(self.model.get_submodule(name), "weight").nbytes for name in self.stream.tied)


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C, which reaches the main thread alone, waits for the end."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def random_basis(size: int, seed: int) -> Tensor:
    """A uniformly random orthogonal matrix `[size, size]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    # QR of a Gaussian matrix, with signs that make Q uniform
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


def own(module: nn.Module, key: str) -> nn.Parameter:
    parameter: Any = module._parameters[key]
    return parameter


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """`[N, K]` as the layer holds it."""
    return weight.T if is_transposed(module) else weight


def untie(model: nn.Module, name: str) -> None:
    """Gives a layer that shares the embedding's matrix one of its own, and lets the config say so."""
    layer = model.get_submodule(name)
    shared = own(layer, "weight")
    layer.register_parameter("weight", nn.Parameter(shared.clone(), shared.requires_grad))
    config: Any = model.config
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        each.tie_word_embeddings = False
    # what transformers found when it built the model
    holder: Any = model
    tied = getattr(holder, "all_tied_weights_keys", None) or {}
    holder.all_tied_weights_keys = {key: of for key, of in tied.items() if key != f"{name}.weight"}
