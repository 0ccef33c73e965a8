"""Statistics block by block, from the last block to the first: one pass, with the matrices of one block in memory.

What enters each block is kept from a pass forward, and the gradient by what leaves it from the block behind; with both,
a block runs again alone. The numbers are those of a pass through the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.blocks import blocks_of
from hf_blr.calibration.blockwise import body_of
from hf_blr.calibration.calls import Batch, Call
from hf_blr.calibration.grams import Grams
from hf_blr.calibration.losses import sampled_loss
from hf_blr.calibration.outputs import frozen, watching
from hf_blr.calibration.passes import passed, passed_over, traced
from hf_blr.calibration.pieces import in_pieces
from hf_blr.calibration.precision import calibrating, tf32
from hf_blr.calibration.sequences import sequences_in
from hf_blr.calibration.store import Store
from hf_blr.calibration.streams import Padding
from hf_blr.calibration.trace import Broken, Trace


class Backwards:
    """A model whose blocks run one after the other, each on what the one before it puts out.

    blocks: {name: its layers}, in their order. tokens: predictions whose losses were summed, once `loss_of` has run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, list[str]],
        forms: dict[str, int | None],
        entered: MutableSequence[Tensor],
        calls: dict[str, list[Call]],
        store: Store,
    ):
        self.model, self.blocks, self.forms, self.calls, self.store = model, blocks, forms, calls, store
        #: {block: what enters it, run by run}
        self.entered: dict[str, MutableSequence[Tensor]] = {next(iter(blocks)): entered}
        #: by what leaves the block that comes next
        self.gradients: MutableSequence[Tensor] = []

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, names: list[str], batches: list[Batch], store: Store) -> Backwards | None:
        """None for a model that is not made so, or whose layers `names` are not all in such blocks."""
        body = body_of(model, names, batches)
        groups = blocks_of(model, body, names, batches)
        modules = {name: model.get_submodule(name) for name in groups}
        first = Trace(modules, set(), Store())
        try:
            first.add(body, batches[0], 0)
        except Broken:
            # a block that runs more than once
            return None
        pieces = first.pieces()
        if len(pieces) != 1 or first.apart or {name for group in groups.values() for name in group} != set(names):
            return None
        if list(pieces[0].blocks) != list(groups) or not passed_over(body, modules, batches[0], pieces[0], first.forms):
            return None
        trace = traced(body, modules, batches, set(), store)
        found = trace.pieces()
        if len(found) != 1 or found[0].batch_of != list(range(len(batches))):
            return None
        return cls(model, groups, first.forms, found[0].hidden, found[0].calls, store)

    def matrices(
        self, batches: list[Batch], seed: int, labels: dict[str, str]
    ) -> Iterator[tuple[list[str], Grams, dict[str, Tensor], int]]:
        """(layers, their H, their G, predictions) of one block after the other, from the last.

        Of a part of its layers where all are above the store's limit.

        Args:
            batches: those that the blocks were traced with.
            seed: of the first sequence; the next one has the next number.
            labels: {layer: the name under which its matrices are summed}.
        """
        counts = [sequences_in(batch) for batch in batches]
        seeds = [seed + sum(counts[:i]) for i in range(len(batches))]
        padding = Padding(self.model, [name for layers in self.blocks.values() for name in layers], batches)
        with frozen(self.model):
            tokens = self.loss_of(self.forward(), batches, seeds)
            for block, layers in reversed(self.blocks.items()):
                pieces = in_pieces(self.model, layers, labels, self.store.limit, output_grams=True) or [[]]
                for number, piece in enumerate(pieces, 1):
                    output_grams: dict[str, Tensor] = {}
                    with watching(self.model, piece, labels, output_grams) as collector:
                        for i in self.backward(block, keep=number == len(pieces)):
                            collector.real = padding.masks(batches[i])
                    yield piece, collector.grams, output_grams, tokens

    @torch.no_grad()
    def forward(self) -> Sequence[Tensor]:
        """Keeps what enters each block; returns what leaves the last one."""
        names = list(self.blocks)
        for name, behind in zip(names, [*names[1:], ""], strict=True):
            left = (self.run(name, hidden, i) for i, hidden in enumerate(self.entered[name]))
            self.entered[behind] = self.store.list(left)
        return self.entered.pop("")

    def loss_of(self, left: Sequence[Tensor], batches: list[Batch], seeds: list[int]) -> int:
        """Keeps the gradients of each batch's loss by what left the last block; returns the predictions in it."""
        self.gradients, tokens = self.store.list(), 0
        for hidden, batch, seed in zip(left, batches, seeds, strict=True):
            leaf = hidden.detach().requires_grad_()
            # a copy, since a norm may write into what it is handed
            with torch.enable_grad(), self.ending_in(leaf.clone()):
                loss, count = sampled_loss(self.model, batch, seed)
            tokens += count
            if loss.requires_grad:
                with tf32():
                    loss.backward()
            self.gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        return tokens

    @contextmanager
    def ending_in(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the blocks compute nothing, and these hidden states leave the last one."""
        modules = {name: self.model.get_submodule(name) for name in self.blocks}
        first = next(iter(modules.values()))
        with passed(modules, {name: self.forms[name] for name in modules}):
            hand_on = vars(first)["forward"]

            def forward(*args: Any, **kwargs: Any) -> Any:
                return hand_on(hidden)

            vars(first)["forward"] = forward
            yield

    def backward(self, name: str, keep: bool) -> Iterator[int]:
        """Runs a block forward and back on all that entered it; yields the number of a run before it.

        Args:
            name: of the last block that was not run so yet.
            keep: the gradients by what entered, for the block before it, whose turn it is then.
        """
        for i, hidden in enumerate(self.entered[name]):
            yield i
            leaf = hidden.detach().requires_grad_()
            with torch.enable_grad():
                left = self.run(name, leaf, i)
            with tf32():
                torch.autograd.backward(left, self.gradients[i])
            if keep and leaf.grad is not None:
                self.gradients[i] = leaf.grad
        if keep:
            del self.entered[name]

    def run(self, name: str, hidden: Tensor, i: int) -> Tensor:
        """What leaves a block for what enters in the i-th run."""
        block = self.model.get_submodule(name)
        with calibrating(block):
            return self.calls[name][i].on(block, hidden)
