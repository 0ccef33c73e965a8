"""Calibration one block at a time, so that only that block's statistics are in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.blocks import blocks_of, list_of
from hf_blr.calibration.calls import Batch, Call, run
from hf_blr.calibration.grams import GramCollector, Grams
from hf_blr.calibration.passes import traced
from hf_blr.calibration.precision import calibrating
from hf_blr.calibration.progress import Progress
from hf_blr.calibration.store import Store
from hf_blr.calibration.streams import Masks, Padding
from hf_blr.calibration.summed import summed_grams
from hf_blr.calibration.trace import Piece
from hf_blr.modes import evaluating
from hf_blr.processes import ALONE, Processes

if TYPE_CHECKING:
    from typing_extensions import Self


def iterate_grams(
    model: nn.Module,
    names: list[str],
    batches: list[Batch],
    progress: Progress | None = None,
    store: Store | None = None,
    processes: Processes = ALONE,
) -> Generator[Grams, None, None]:
    """Yields {layer name: Gram `[K, K]`} for the layers of one block after the other; all come from the dense model.

    The caller may replace a block's layers as soon as it has its statistics: what enters the other blocks does not
    change by it. Layers of blocks that cannot be run alone come first, all at once, which needs the memory for it.
    Layers that no input reaches do not come.

    Args:
        names: dense linear layers, in the model's order.
        batches: keyword arguments of the model's forward, on its device.
        progress: blocks whose layers are all finished do not come.
        store: where hidden states are kept.
        processes: each runs its share of the batches, which all of them hold; each gets the sums.
    """
    with evaluating(model), torch.no_grad():
        chain = BlockChain.trace(model, names, batches, progress, store, processes)
        if not chain.progress.has_all(chain.apart):
            yield whole_model_grams(model, list(chain.apart), batches, processes=processes)
        while chain.segments:
            with closing(chain.run(chain.segments.pop(0))) as groups:
                yield from groups


def whole_model_grams(
    model: nn.Module,
    names: list[str],
    batches: list[Batch],
    labels: dict[str, str] | None = None,
    processes: Processes = ALONE,
) -> Grams:
    """{layer name: Gram} from one pass over all batches; `labels` as in `GramCollector`."""
    batches = batches[processes.share(len(batches))]
    body, padding = body_of(model, names, batches), Padding(model, names, batches)
    modules = {name: model.get_submodule(name) for name in names}
    with torch.no_grad(), GramCollector(modules, labels) as collector:
        for batch in batches:
            collector.real = padding.masks(batch)
            run(body, batch)
    return summed_grams(collector.grams, processes)


def body_of(model: nn.Module, names: list[str], batches: list[Batch]) -> nn.Module:
    """The model without its head, if that holds all of the layers: logits over a large vocabulary cost much memory."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    held = all(id(model.get_submodule(name)) in inside for name in names)
    # only the head knows what to do with labels
    return body if held and not any("labels" in batch for batch in batches) else model


@dataclass
class Segment:
    """A piece of the model, with its layers and the positions that count.

    groups: {block: its layers}. piece: what goes in, run by run. real: what counts in each run.
    """

    groups: dict[str, list[str]]
    piece: Piece
    real: list[Masks]


class BlockChain:
    """The blocks of a model, in the order in which it runs them, with what each is called with on each batch.

    segments: blocks that hand the hidden states on to one another, in pieces; an encoder is one, a decoder another.
    apart: {layer: why its block cannot be run alone}.
    progress: what need not be looked at again.
    store: where hidden states are kept.
    processes: that share the text; `batches` are those of this one.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        segments: list[Segment],
        apart: dict[str, str],
        progress: Progress,
        store: Store,
        processes: Processes,
    ):
        self.model, self.batches, self.segments, self.apart = model, batches, segments, apart
        self.progress, self.store, self.processes = progress, store, processes

    @classmethod
    @torch.no_grad()
    def trace(
        cls,
        model: nn.Module,
        names: list[str],
        batches: list[Batch],
        progress: Progress | None = None,
        store: Store | None = None,
        processes: Processes = ALONE,
    ) -> Self:
        """Records what the blocks are called with on each batch that is this process' own.

        Raises:
            ValueError: if a block overflows its dtype, or the model runs otherwise on the text of another process.
        """
        batches = batches[processes.share(len(batches))]
        body = body_of(model, names, batches)
        groups = blocks_of(model, body, names, batches)
        blocks = {block: model.get_submodule(block) for block in groups}
        store = store or Store()
        trace = traced(body, blocks, batches, set(), store, check=True)
        padding = Padding(model, [*names, *groups], batches)
        masks = [padding.masks(batch) for batch in batches]
        segments = [
            Segment({block: groups[block] for block in piece.blocks}, piece, [masks[i] for i in piece.batch_of])
            for piece in trace.pieces()
        ]
        apart = {
            name: trace.apart[list_of(block)]
            for block, layers in groups.items()
            for name in layers
            if list_of(block) in trace.apart
        }
        forms = processes.gathered((list(apart), [list(segment.groups) for segment in segments]))
        if any(form != forms[0] for form in forms):
            raise ValueError("the model runs its blocks otherwise on the text of another process; use one process")
        return cls(model, batches, segments, apart, progress or Progress(), store, processes)

    def run(self, segment: Segment) -> Generator[Grams, None, None]:
        """Yields {layer: Gram} of one block of a segment after the other, while the block is as it was.

        The segment gives up what it holds on the way. A block whose layers are all finished hands on, and no more.
        """
        hidden = segment.piece.hidden
        for prefix, named in segment.groups.items():
            block, calls = self.model.get_submodule(prefix), segment.piece.calls.pop(prefix)
            names = [] if self.progress.has_all(named) else named
            with GramCollector({name: self.model.get_submodule(name) for name in names}) as collector:
                for i, entered in enumerate(hidden):
                    collector.real = segment.real[i]
                    hidden[i] = self.forward(block, entered, calls[i])
            if names:
                yield summed_grams(collector.grams, self.processes)

    def retraced(self, segment: Segment) -> Piece | None:
        """What goes into a segment of the model as it is now; None if that has another form than before."""
        piece = segment.piece
        numbers = sorted(set(piece.batch_of))
        batches = [self.batches[i] for i in numbers]
        blocks = {block: self.model.get_submodule(block) for block in piece.blocks}
        body = body_of(self.model, piece.blocks, batches)
        found = traced(body, blocks, batches, {piece.blocks[0]}, self.store).pieces()
        if len(found) != 1 or found[0].blocks != piece.blocks:
            return None
        again = found[0]
        again.batch_of = [numbers[i] for i in again.batch_of]
        shapes = [[hidden.shape for hidden in each.hidden] for each in (piece, again)]
        return again if again.batch_of == piece.batch_of and shapes[0] == shapes[1] else None

    @torch.no_grad()
    def forward(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """The block's hidden states, for those that enter it; `call` is what else it was called with."""
        return self.forward_as(block, block, hidden, call)

    def forward_as(self, block: nn.Module, function: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
        """Likewise by a function in the block's place, with a graph for gradients where they are enabled."""
        with calibrating(block):
            return call.on(function, hidden)
