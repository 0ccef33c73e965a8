"""What a model calls its repeated blocks with, batch by batch, so that a block can be run again alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blr.calibration.precision import calibrating

Batch = dict[str, Tensor]
#: what a block is called with besides the hidden states: (args, kwargs)
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One call of a block: all that it was handed, and what it gave back."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class ReachedBlock(Exception):
    """Ends a forward pass where its caller has seen enough; carries the tensor that was there."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks behind these handles off again at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batch: Batch) -> Any:
    """A calibration forward, which fills no key-value cache."""
    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with calibrating(model):
        return model(**batch, **cache)


def first(output: Any) -> Any:
    """A block returns its hidden states, alone or ahead of other things."""
    return output[0] if isinstance(output, tuple) else output


def record_calls(
    body: nn.Module, blocks: dict[str, nn.Module], batches: list[Batch]
) -> tuple[list[Tensor], dict[str, list[Call]]] | None:
    """(the hidden states that enter the first block, {block: its calls}), each batch by batch.

    None if the model is no plain chain of these blocks on some batch: each block must run once, in this order, and be
    handed the very output of the one before it as its first argument.

    The first batch runs through the whole model. Later ones pass over the blocks, where that was seen to change no
    argument of any block on the first batch, and so cost little more than the embedding. Arguments that are equal to
    those of the first batch (positions, rotary embeddings) are kept once.

    Raises:
        ValueError: if a block overflows its dtype.
    """
    order = list(blocks)
    ran = steps_through(body, blocks, batches[0])
    if not is_chain(ran, order):
        return None
    check_range(ran)
    forms = {step.block: len(step.output) if isinstance(step.output, tuple) else None for step in ran}
    over = passed_over(body, blocks, batches[0], ran, forms)
    hidden: list[Tensor] = []
    calls: dict[str, list[Call]] = {block: [] for block in order}
    steps = over or ran
    del ran
    for i, batch in enumerate(batches):
        with torch.no_grad():
            if i:
                steps = (
                    steps_over(body, blocks, batch, forms) if over else steps_through(body, blocks, batch, stop=True)
                )
        if not is_chain(steps, order):
            return None
        hidden.append(steps[0].args[0])
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for step in steps:
            call = (step.args[1:], step.kwargs)
            if calls[step.block]:
                args, kwargs = calls[step.block][0]
                call = (
                    kept_once(call[0], args, seen),
                    {key: kept_once(value, kwargs.get(key), seen) for key, value in step.kwargs.items()},
                )
            calls[step.block].append(call)
    return hidden, calls


def check_range(ran: list[Step]) -> None:
    """Raises ValueError that names the first block whose output is not finite: fits to it would fail half-way."""
    for step in ran:
        out = first(step.output)
        if not torch.isfinite(out).all():
            dtype = str(out.dtype).removeprefix("torch.")
            raise ValueError(
                f"{step.block} puts out NaN or infinity on the calibration data in {dtype}; load the model in bfloat16 "
                "or float32"
            )


def steps_through(body: nn.Module, blocks: dict[str, nn.Module], batch: Batch, stop: bool = False) -> list[Step]:
    """The calls in a forward pass that runs the blocks; `stop` leaves out what follows the last of them."""
    steps: list[Step] = []
    last = list(blocks)[-1]

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            steps.append(Step(name, args, kwargs, output))
            if stop and name == last:
                raise ReachedBlock(first(output))

        return hook

    handles = [block.register_forward_hook(record(name), with_kwargs=True) for name, block in blocks.items()]
    with hooked(handles), suppress(ReachedBlock):
        run(body, batch)
    return steps


def steps_over(body: nn.Module, blocks: dict[str, nn.Module], batch: Batch, forms: dict[str, int | None]) -> list[Step]:
    """The calls in a forward pass in which each block hands on what enters it, and that ends at the last one.

    Args:
        forms: {block: how many things it gives back as a tuple, None for hidden states alone}.
    """
    steps: list[Step] = []
    last = list(blocks)[-1]

    def passing(name: str) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            steps.append(Step(name, (hidden, *args), kwargs, hidden))
            if name == last:
                raise ReachedBlock(hidden)
            size = forms[name]
            return hidden if size is None else (hidden, *[None] * (size - 1))

        return forward

    own = {name: vars(block).get("forward") for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            vars(block)["forward"] = passing(name)
        with suppress(ReachedBlock):
            run(body, batch)
    finally:
        for name, block in blocks.items():
            del vars(block)["forward"]
            if own[name] is not None:
                vars(block)["forward"] = own[name]
    return steps


def is_chain(steps: list[Step], order: list[str]) -> bool:
    """Whether the blocks ran once each, in this order, each on the very output of the one before it."""
    if [step.block for step in steps] != order or not all(s.args and torch.is_tensor(s.args[0]) for s in steps):
        return False
    return all(first(a.output) is b.args[0] for a, b in zip(steps, steps[1:], strict=False))


def passed_over(
    body: nn.Module, blocks: dict[str, nn.Module], batch: Batch, ran: list[Step], forms: dict[str, int | None]
) -> list[Step] | None:
    """The calls in a forward pass over the blocks; None unless they are called alike when none computes anything.

    They are not where one block computes what another is handed beside the hidden states, as a position bias or shared
    keys.
    """
    try:
        passed = steps_over(body, blocks, batch, forms)
    except Exception:  # whatever a model does with a block's further outputs: then it needs them
        return None
    alike = len(passed) == len(ran) and all(
        same((a.args[1:], a.kwargs), (b.args[1:], b.kwargs)) for a, b in zip(ran, passed, strict=True)
    )
    return passed if alike else None


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same object or equal; objects of unknown kinds count as different."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, MutableMapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and bool(a == b)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def kept_once(new: Any, old: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """An argument with its tensors replaced by those of the first batch, where they are equal.

    Only tensors and tuples of them: what can be written to belongs to one batch.

    Args:
        seen: {id: (tensor, what was kept for it)} of this batch, as blocks share arguments.
    """
    if torch.is_tensor(new):
        if id(new) not in seen:
            seen[id(new)] = (new, old if torch.is_tensor(old) and equal(new, old) else new)
        return seen[id(new)][1]
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(kept_once(x, y, seen) for x, y in zip(new, old, strict=True))
    return new


def with_own_state(calls: dict[str, list[Call]]) -> dict[str, list[Call]]:
    """The same calls for a second model: dictionaries, in which blocks leave things for later ones, are copied.

    A dictionary that several blocks are handed stays one.
    """
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return value
        return copies.setdefault(id(value), copy.copy(value))

    return {
        block: [(tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}) for args, kwargs in each]
        for block, each in calls.items()
    }
