"""The residual stream of a language model: which modules read it, through which norms, and which write to it.

It is found by a forward over random token ids: a layer reads the stream through the norm whose output it is handed.
What is neither an embedding, a norm nor a linear layer, or reads the stream otherwise, is refused by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.compression.stream_trial import Watcher, owners_of, plain_tensors, trial_outputs
from hf_blr.dense import feature_sizes, is_dense_linear
from hf_blr.linear import blr_modules

#: of an RMS norm's output, how far it may be from what such a norm gives: some round their input to bfloat16
ROUNDING = 2e-2


@dataclass(frozen=True)
class Stream:
    """What a model with this stream computes does not depend on the stream's basis, once `find_stream` has tried it.

    size: D, features of the stream. embedding: the module whose V rows `[D]` begin the stream, V the vocabulary.
    norms: those through which it is read. readers: {linear layer that reads it: its norm}. writers: linear layers that
    add to it. tied: the readers whose weight is the embedding's. inner: norms of what layers put out.
    """

    size: int
    vocabulary: int
    embedding: str
    norms: tuple[str, ...]
    readers: dict[str, str]
    writers: tuple[str, ...]
    tied: tuple[str, ...]
    inner: tuple[str, ...] = ()


@dataclass
class Seen(Watcher):
    """A forward: what each module with parameters was handed.

    sources: {module: the modules whose outputs it was handed; None for any other tensor}, for those that ran.
    """

    sources: dict[str, set[str | None]] = field(default_factory=dict)
    #: {place in memory: (what lies there, kept so that nothing else comes to lie there; the module that put it out)}
    places: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def entered(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handed = next((t for t in (*args, *kwargs.values()) if torch.is_tensor(t) and t.is_floating_point()), None)
        source = None if handed is None else self.places.get(place_of(handed), (None, None))[1]
        self.sources.setdefault(name, set()).add(source)

    def left(self, name: str, output: Any) -> None:
        if torch.is_tensor(output):
            self.places[place_of(output)] = output, name


def place_of(tensor: Tensor) -> int:
    """A view lies where the tensor lies of which it is a view."""
    return tensor.untyped_storage().data_ptr()


def find_stream(model: nn.Module) -> tuple[Stream, Tensor]:
    """The stream, and the model's outputs in float32 on the ids of the trial.

    Raises:
        ValueError: by name, for what reads or writes the stream otherwise than through a weighted RMS norm and linear
            layers, or cannot be asked: a model that is no transformers model of text, is compressed already or partly
            offloaded.
    """
    embedding = embedding_of(model)
    owners = owners_of(model)
    size = embedding.weight.shape[1]
    seen = Seen()
    outputs = trial_outputs(model, embedding.weight.shape[0], plain_tensors, seen)
    unseen = [name for name in owners if name not in seen.sources]
    if unseen:
        raise refusal(model, unseen[0], "did not run in a forward on token ids alone")
    start = next(name for name, module in owners.items() if module is embedding)
    linears = {name: module for name, module in owners.items() if is_dense_linear(module)}
    inner, norms = [], []
    for name, module in owners.items():
        if name == start or name in linears:
            continue
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.dim() != 1:
            raise refusal(model, name, "is neither a norm nor a linear layer")
        if seen.sources[name] <= linears.keys():
            # of heads, or of a bottleneck: what it reads is no stream
            inner.append(name)
            continue
        if not is_rms_norm(module, size):
            raise refusal(model, name, f"is no RMS norm of {size} features, w * x / sqrt(mean(x^2))")
        norms.append(name)
    readers = {name: source for name in linears for source in seen.sources[name] if source in norms}
    for name in linears:
        if name in readers and len(seen.sources[name]) > 1 or start in seen.sources[name]:
            raise refusal(model, name, "reads the stream without a norm, or through several")
    deaf = [name for name in norms if name not in readers.values()]
    if deaf:
        raise refusal(model, deaf[0], "is read by no linear layer, so that its outputs would change")
    writers = tuple(n for n, m in linears.items() if n not in readers and feature_sizes(m)[1] == size)
    tied = tuple(name for name in readers if linears[name].weight is embedding.weight)
    check_ties(model, start, tied)
    return Stream(size, len(embedding.weight), start, tuple(norms), readers, writers, tied, tuple(inner)), outputs


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The table of token embeddings. Raises ValueError where there is none, or the model cannot be tried."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = None if find is None else find()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise ValueError(
            f"the stream of a {type(model).__name__} cannot be turned: expected a transformers model that reads token "
            f"ids through an embedding, got {type(found).__name__} for one; leave turned out"
        )
    if blr_modules(model):
        raise ValueError("layers are compressed already, and whole matrices are turned: load the dense model")
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(
            f"{away[0]} is offloaded ({len(away)} parameters are), and weights must be in memory to be turned: load "
            "the model without offloading (--offload-weights, or a device_map with cpu or disk), or leave turned out"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        # between two, what a norm puts out is copied, and no longer known again
        raise ValueError(
            f"the model lies on {', '.join(sorted(devices))}, and a stream is followed on one device: load the model "
            "on the CPU (fits run on a GPU all the same), or leave turned out"
        )
    return found


def check_ties(model: nn.Module, embedding: str, tied: tuple[str, ...]) -> None:
    """Raises ValueError for weights that are shared otherwise than between the embedding and the layers `tied`."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for parameter in model.parameters():
        extra = [name for name in owners[id(parameter)] if name not in (embedding, *tied)]
        if extra and len(owners[id(parameter)]) > 1:
            raise refusal(model, extra[0], f"shares a weight with {owners[id(parameter)][0]}")


def is_rms_norm(norm: nn.Module, size: int) -> bool:
    """Whether it computes w * x / sqrt(mean(x^2)) of its own weight w `[size]`, which numbers of its own show."""
    parameters = dict(norm.named_parameters(recurse=False))
    weight = parameters.pop("weight")
    if weight.shape != (size,) or any(p is not None for p in parameters.values()):
        return False
    # with a mean that is not zero, and so large that what is added to the mean of squares does not count
    numbers = torch.arange(2 * size, device=weight.device, dtype=torch.float64).view(2, size)
    x = (numbers.sin() + 0.5) * 64
    kept = norm._parameters["weight"]
    gains = 2 + numbers[0].cos()
    norm._parameters["weight"] = nn.Parameter(gains.float(), requires_grad=False)
    try:
        with torch.no_grad():
            out = type(norm).forward(norm, x.float())
    except Exception:
        return False
    finally:
        norm._parameters["weight"] = kept
    wanted = gains * x / x.square().mean(-1, keepdim=True).sqrt()
    return torch.is_tensor(out) and bool((out.double() - wanted).norm() < ROUNDING * wanted.norm())


def refusal(model: nn.Module, name: str, reason: str) -> ValueError:
    kind = type(model.get_submodule(name)).__name__
    return ValueError(
        f"the stream of a {type(model).__name__} cannot be turned: {name or 'the model'} ({kind}) {reason}; leave "
        "turned out"
    )
