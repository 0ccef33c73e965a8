"""The passes that fill a trace: the first through the model, later ones over its blocks where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_blr.calibration.arguments import same
from hf_blr.calibration.calls import Batch, split_call
from hf_blr.calibration.store import Store
from hf_blr.calibration.trace import Broken, Piece, Trace


def traced(
    body: nn.Module,
    blocks: dict[str, nn.Module],
    batches: list[Batch],
    heads: set[str],
    store: Store,
    check: bool = False,
) -> Trace:
    """The record of all batches.

    The first runs through the whole model. Where all blocks are one piece, later batches pass over them, if that was
    seen to change no argument of any block on the first batch, and so cost little more than the embedding. Arguments
    that are equal to those of the first batch (positions, rotary embeddings) are kept once.

    Args:
        heads: blocks known to begin a piece; more come to it.
        store: where hidden states are kept.
        check: raise ValueError for a block whose output is not finite on the first batch.
    """
    while True:
        try:
            return trace_with(body, blocks, batches, heads, store, check)
        except Broken:
            continue


def trace_with(
    body: nn.Module, blocks: dict[str, nn.Module], batches: list[Batch], heads: set[str], store: Store, check: bool
) -> Trace:
    trace = Trace(blocks, heads, store)
    #: {what a batch holds: how many calls it makes}
    counts = {frozenset(batches[0]): trace.add(body, batches[0], 0, check=check)}
    pieces, passing = trace.pieces(), {}
    whole = len(pieces) == 1 and not trace.apart
    if whole and len(batches) > 1 and passed_over(body, blocks, batches[0], pieces[0], trace.forms):
        passing = {block: trace.forms[block] for block in pieces[0].blocks}
    for number, batch in enumerate(batches[1:], 1):
        kind = frozenset(batch)
        with passed(blocks, passing):
            counts[kind] = trace.add(body, batch, number, stop=counts.get(kind))
    return trace


def passed_over(
    body: nn.Module, blocks: dict[str, nn.Module], batch: Batch, ran: Piece, forms: dict[str, int | None]
) -> bool:
    """Whether these blocks run once each, and are called alike when none of them computes anything.

    They are not where one block computes what another is handed beside the hidden states, as a position bias or shared
    keys.
    """
    if len(ran.hidden) > 1:
        return False
    trace = Trace({block: blocks[block] for block in ran.blocks}, {ran.blocks[0]}, Store())
    try:
        with passed(blocks, {block: forms[block] for block in ran.blocks}):
            trace.add(body, batch, 0, stop=len(ran.blocks))
    except Exception:  # whatever a model does with a block's further outputs: then it needs them
        return False
    return trace.calls.keys() == ran.calls.keys() and all(
        len(trace.calls[block]) == 1
        and same((call.args, call.kwargs), (trace.calls[block][0].args, trace.calls[block][0].kwargs))
        for block, (call,) in ran.calls.items()
    )


@contextmanager
def passed(blocks: dict[str, nn.Module], forms: dict[str, int | None]) -> Iterator[None]:
    """Inside, the blocks of `forms` hand on what enters them."""

    def passing(size: int | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = split_call(args, kwargs)
            return hidden if size is None else (hidden, *[None] * (size - 1))

        return forward

    own = {name: vars(blocks[name]).get("forward") for name in forms}
    try:
        for name, size in forms.items():
            vars(blocks[name])["forward"] = passing(size)
        yield
    finally:
        for name in forms:
            del vars(blocks[name])["forward"]
            if own[name] is not None:
                vars(blocks[name])["forward"] = own[name]
