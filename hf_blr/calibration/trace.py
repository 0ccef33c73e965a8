"""What enters each block of a model on each batch, and which blocks hand the hidden states on to one another."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.arguments import call_kept_once
from hf_blr.calibration.blocks import list_of
from hf_blr.calibration.calls import Batch, Call, ReachedBlock, first, hooked, run, split_call, writes_to
from hf_blr.calibration.store import Store, StoredList

#: pieces that a list of blocks may fall into where something stands between two of them: what enters each piece is kept
#: for all batches
MOST_PIECES = 8


@dataclass
class Piece:
    """Blocks of which each hands its hidden states on to the next, and what went in, run by run.

    A run is one pass through all of the blocks: a batch makes one, several where the model calls its blocks again, and
    none where it does without them.

    blocks: in their order. hidden: what entered the first one. calls: {block: its calls}. batch_of: the batch of each
    run.
    """

    blocks: list[str]
    hidden: MutableSequence[Tensor]
    calls: dict[str, list[Call]]
    batch_of: list[int]


class Broken(Exception):
    """A block that was handed on to before is not any more: what entered it must be kept from the first batch on."""


class Trace:
    """A record of calls, filled batch by batch.

    Args:
        blocks: {name: block}.
        heads: blocks known to begin a piece.
        store: where hidden states are kept.
    """

    def __init__(self, blocks: dict[str, nn.Module], heads: set[str], store: Store):
        self.blocks, self.heads, self.store = blocks, heads, store
        self.hidden: dict[str, StoredList] = {}
        self.calls: dict[str, list[Call]] = {}
        self.batch_of: dict[str, list[int]] = {}
        #: {block: the one before it in its piece}, and the other way round
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        #: {list of blocks: why they cannot be run alone}
        self.apart: dict[str, str] = {}
        #: {block: how many things it gives back as a tuple, None for hidden states alone}
        self.forms: dict[str, int | None] = {}
        self.visits = 0
        #: {list: its block that ran last, what left it, and how often that had been written to}
        self._latest: dict[str, tuple[str, weakref.ref[Tensor], int]] = {}
        #: {block that runs: what entered it, and how often that had been written to}
        self._entered: dict[str, tuple[Tensor, int]] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, body: nn.Module, batch: Batch, number: int, stop: int | None = None, check: bool = False) -> int:
        """Runs a batch through the model and records it; returns how many calls there were.

        Args:
            stop: ends the pass behind so many calls.
            check: raise ValueError for a block whose output is not finite.

        Raises:
            Broken: see there; `heads` then holds the block.
        """
        self.visits, self._latest, self._entered, self._seen = 0, {}, {}, {}
        handles = []
        for name, block in self.blocks.items():
            # ahead of hooks that are the block's own, which run again when it does
            enter = self._enter(name, number)
            handles.append(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave(name, stop, check), with_kwargs=True))
        with hooked(handles), suppress(ReachedBlock), torch.no_grad():
            run(body, batch)
        for name, before in self.before.items():
            if list_of(name) not in self.apart and len(self.calls[name]) != len(self.calls[before]):
                self._break(name)
        return self.visits

    def pieces(self) -> list[Piece]:
        """The blocks that ran, in pieces, in the order in which the model comes to them."""
        found = []
        for head in self.hidden:
            blocks = [head]
            while blocks[-1] in self.after:
                blocks.append(self.after[blocks[-1]])
            calls = {block: self.calls[block] for block in blocks}
            found.append(Piece(blocks, self.hidden[head], calls, self.batch_of[head]))
        return found

    def _enter(self, name: str, number: int) -> Callable[..., None]:
        parent = list_of(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if parent in self.apart:
                return
            hidden, call = split_call(args, kwargs)
            if hidden is None:
                return self._give_up(parent, f"{name} is handed no tensor")
            self.visits += 1
            self._entered[name] = hidden, writes_to(hidden)
            source = self._source(name, parent, hidden)
            calls = self.calls.setdefault(name, [])
            if name not in self.heads:
                if source is None and not calls:
                    self.heads.add(name)
                elif (
                    source is None
                    or self.before.setdefault(name, source) != source
                    or self.after.setdefault(source, name) != name
                ):
                    self._break(name)
            if name in self.heads:
                if name not in self.hidden:
                    self.hidden[name] = self.store.list()
                self.hidden[name].append(hidden)
                if sum(list_of(head) == parent for head in self.heads) > MOST_PIECES:
                    latest = self._latest[parent][0] if parent in self._latest else "the block before it"
                    reason = f"{name} is handed something else than {latest} puts out, and so are others"
                    return self._give_up(parent, reason)
            calls.append(call_kept_once(call, calls[0], self._seen) if calls else call)
            self.batch_of.setdefault(name, []).append(number)

        return hook

    def _leave(self, name: str, stop: int | None, check: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            out, parent = first(output), list_of(name)
            self.forms[name] = len(output) if isinstance(output, tuple) else None
            if parent in self.apart:
                return
            if not torch.is_tensor(out):
                return self._give_up(parent, f"{name} puts out no tensor")
            hidden, writes = self._entered.pop(name)
            if writes_to(hidden) != writes:
                return self._give_up(parent, f"{name} writes into what it is handed")
            if check and not torch.isfinite(out).all():
                dtype = str(out.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name} puts out NaN or infinity on the calibration data in {dtype}; load the model in bfloat16 "
                    "or float32"
                )
            self._latest[parent] = name, weakref.ref(out), writes_to(out)
            if self.visits == stop:
                raise ReachedBlock(out)

        return hook

    def _source(self, name: str, parent: str, hidden: Tensor) -> str | None:
        """The block of the same list whose output this is."""
        if parent not in self._latest:
            return None
        latest, output, writes = self._latest[parent]
        return latest if latest != name and output() is hidden and writes_to(hidden) == writes else None

    def _give_up(self, parent: str, reason: str) -> None:
        self.apart[parent] = reason
        for kept in (self.hidden, self.calls, self.batch_of):
            for block in [block for block in kept if list_of(block) == parent]:
                kept.pop(block)

    def _break(self, name: str) -> None:
        self.heads.add(name)
        raise Broken
