"""Fits that know about the errors before them.

Layer by layer, in the order in which the model runs them, each is fitted on the inputs X~ that the model compressed so
far gives it, towards what the dense model's layer puts out for its own inputs X. The best unconstrained answer is a
regression, W* = T X~^T (X~ X~^T)^-1 for targets T, and the structure is fitted to W* in the metric of X~.

Layers that write to the residual stream (`o_proj`, `down_proj`) get more than their own output as target: also the
difference between the dense and the compressed stream that they write to. So each undoes what it can of all the errors
before it, and errors stop piling up with depth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blr.calibration.arguments import with_own_state
from hf_blr.calibration.blockwise import BlockChain, Segment
from hf_blr.calibration.calls import Call, ReachedBlock, hooked
from hf_blr.calibration.joint import Run
from hf_blr.calibration.problem import Problem, problems_of
from hf_blr.calibration.residual import add, counted, residual_writers, rows_of
from hf_blr.calibration.routed import pooled
from hf_blr.calibration.streams import Masks
from hf_blr.calibration.trace import Piece
from hf_blr.dense import dense_weight, is_dense_linear
from hf_blr.experts import lies_in_experts
from hf_blr.factorize.gram import cholesky, damped
from hf_blr.factorize.options import damping_of

logger = logging.getLogger(__name__)

#: how much of the way from W to W* a layer goes that does not write to the residual stream. The whole way is the best
#: for its own output, but shrinks it (X~ is a noisy X); half the way gave the lower perplexity at every size tried
READER_SHARE = 0.5
#: how much of what the stream has lost before it a block is refined to make up for. With all of it as target, its inner
#: layers give up the loss's own weighting to repair the stream; with none, losses pile up. Of those three, half gave
#: the lowest perplexity
STREAM_SHARE = 0.5

#: (name, block, run, what entered, what should leave), as `refine_block` takes them
AfterBlock = Callable[[str, nn.Module, Run, list[Tensor], list[Tensor]], None]


@dataclass
class DenseRun:
    """What the dense block did, run by run, on its own inputs."""

    entered: list[Tensor]
    #: the positions that count
    real: list[Masks]
    left: list[Tensor] = field(default_factory=list)
    #: layers that were handed the same tensor, in the order of the calls
    groups: list[list[str]] = field(default_factory=list)
    #: {first layer of a group: its inputs}
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    #: {layer that adds its output to the residual stream: its outputs}, in the order of the calls
    written: dict[str, list[Tensor]] = field(default_factory=dict)


class SequentialChain(BlockChain):
    """Runs the dense and the compressed model side by side through chains of blocks."""

    def problems(self, damping: float | None, after_block: AfterBlock | None = None) -> Iterator[dict[str, Problem]]:
        """{layer: Problem} for the layers that share an input, one such group after the other.

        The caller must have replaced the layers of a group when it asks for the next. What enters a segment behind the
        first, and what its blocks are called with besides, comes from the model compressed so far.

        Args:
            damping: as in `BLRConfig`.
            after_block: called once all layers of a block are replaced, as `refine_block` is, without the last two.
                What it is told to aim at lies between the dense model's stream and what the dense block makes of the
                compressed model's.
        """
        # with nothing replaced, the first segment's inputs are those of the dense model
        untouched = not self.apart
        while self.segments:
            segment = self.segments.pop(0)
            piece = segment.piece
            if untouched:
                compressed = Piece(piece.blocks, list(piece.hidden), with_own_state(piece.calls), piece.batch_of)
                yield from self.segment_problems(segment, compressed, damping, after_block)
            elif (again := self.retraced(segment)) is not None:
                yield from self.segment_problems(segment, again, damping, after_block)
            else:
                logger.warning(
                    "%s runs otherwise in the model compressed so far: its layers are fitted on the dense model's "
                    "inputs",
                    piece.blocks[0],
                )
                for grams in self.run(segment):
                    experts = [name for name in grams if lies_in_experts(self.model, name)]
                    yield pooled(problems_of(grams), experts)
            untouched = False

    def segment_problems(
        self, segment: Segment, compressed: Piece, damping: float | None, after_block: AfterBlock | None
    ) -> Iterator[dict[str, Problem]]:
        """Those of one segment, for what goes into it in the model compressed so far."""
        entered, hidden = segment.piece.hidden, compressed.hidden
        # what entered the first block is not kept while later ones are fitted
        segment.piece.hidden = []
        for prefix, names in segment.groups.items():
            block = self.model.get_submodule(prefix)
            dense_calls, calls = segment.piece.calls.pop(prefix), compressed.calls.pop(prefix)
            dense = self.run_dense(block, prefix, names, entered, dense_calls, segment.real)
            real = [masks.get(prefix) for masks in segment.real]
            wanted = self.between(block, hidden, dense.left, calls, real) if after_block is not None else []
            experts = [name for name in names if lies_in_experts(self.model, name)]
            for group in dense.groups:
                if group[0] not in experts:
                    yield self.group_problems(block, calls, dense, group, hidden, damping)
            if experts:
                # the router sends them other tokens in the compressed model: there is nothing to regress on
                inputs = {name: dense.inputs[name] for name in experts if name in dense.inputs}
                masks = {name: [each.get(name) for each in segment.real] for name in inputs}
                yield pooled({name: plain_problem(x, masks[name]) for name, x in inputs.items()}, experts)
            dense.inputs.clear()
            # a layer that is a block by itself has another in its place now
            block = self.model.get_submodule(prefix)
            if after_block is not None:
                after_block(prefix, block, partial(self.run_as, block, calls, real), hidden, wanted)
            if segment.piece.calls:
                for i, x in enumerate(hidden):
                    hidden[i] = self.forward(block, x, calls[i])
            entered = dense.left

    def between(
        self, block: nn.Module, entered: list[Tensor], left: list[Tensor], calls: list[Call], real: list[Tensor | None]
    ) -> list[Tensor]:
        """`STREAM_SHARE` of the way from what the still dense block makes of these inputs to the dense stream."""
        return [
            counted(torch.lerp(self.forward(block, x, call), y, STREAM_SHARE), positions)
            for x, y, call, positions in zip(entered, left, calls, real, strict=True)
        ]

    def run_as(
        self,
        block: nn.Module,
        calls: list[Call],
        real: list[Tensor | None],
        function: Callable[..., Any],
        hidden: Tensor,
        run: int,
    ) -> Tensor:
        return counted(self.forward_as(block, function, hidden, calls[run]), real[run])

    def run_dense(
        self,
        block: nn.Module,
        prefix: str,
        names: list[str],
        entered: list[Tensor],
        calls: list[Call],
        real: list[Masks],
    ) -> DenseRun:
        """Passes all that enters through the still dense block."""
        run = DenseRun(entered, real)
        run.groups, writers = self.survey(block, prefix, names, entered[0], calls[0], real[0].get(prefix))
        run.inputs = {group[0]: [] for group in run.groups}
        run.written = {name: [] for name in writers}
        handles = [self.on_input(name, partial(keep, to)) for name, to in run.inputs.items()]
        handles += [self.on_output(name, partial(keep, to)) for name, to in run.written.items()]
        with hooked(handles):
            for hidden, call in zip(entered, calls, strict=True):
                run.left.append(self.forward(block, hidden, call))
        return run

    def survey(
        self, block: nn.Module, prefix: str, names: list[str], entered: Tensor, call: Call, real: Tensor | None
    ) -> tuple[list[list[str]], list[str]]:
        """The block's groups of layers with one input, and its residual writers, from one run."""
        groups: list[list[str]] = []
        outputs: dict[str, Tensor] = {}
        latest: Tensor | None = None
        sharing: list[str] | None = None

        def see(name: str, x: Tensor) -> None:
            nonlocal latest, sharing
            if x is not latest:
                latest, sharing = x, None
            if name not in names or any(name in group for group in groups):
                return
            if sharing is None:
                sharing = []
                groups.append(sharing)
            sharing.append(name)

        dense = [name for name, module in block.named_modules(prefix=prefix) if is_dense_linear(module)]
        handles = [self.on_input(name, partial(see, name)) for name in dense]
        handles += [self.on_output(name, partial(keep_as, outputs, name)) for name in dense]
        with hooked(handles):
            left = self.forward(block, entered, call)
        if left.shape != entered.shape:
            # a block that merges patches keeps no stream to write to
            return groups, []
        return groups, residual_writers(left.float() - entered.float(), outputs, real)

    def group_problems(
        self,
        block: nn.Module,
        calls: list[Call],
        dense: DenseRun,
        group: list[str],
        compressed: list[Tensor],
        damping: float | None,
    ) -> dict[str, Problem]:
        """The regressions of one group, from all batches."""
        writer = group[0] if group[0] in dense.written and len(group) == 1 else None
        earlier = list(dense.written)[: list(dense.written).index(writer)] if writer else []
        inputs = dense.inputs[group[0]]
        real = [masks.get(group[0]) for masks in dense.real]
        gram: Tensor | None = None
        cross: Tensor | None = None
        pull: Tensor | None = None
        count = 0
        for i, hidden in enumerate(compressed):
            reached, written = self.inputs_of(block, group[0], hidden, calls[i], earlier)
            if len(inputs) != len(compressed) or reached is None or reached.shape != inputs[i].shape:
                # a layer that runs more than once, or experts that see other tokens now: there is nothing to regress on
                return dict.fromkeys(group, plain_problem(inputs, real))
            x, reached = rows_of(inputs[i], real[i]), rows_of(reached, real[i])
            gram = add(gram, reached.mT @ reached)
            cross = add(cross, x.mT @ reached)
            count += len(reached)
            if writer:
                gap = dense.entered[i].float() - hidden.float()
                for name in earlier:
                    gap += dense.written[name][i].float() - written[name].float()
                pull = add(pull, rows_of(gap, real[i]).mT @ reached)
        # there is a batch, or no block would have been traced
        assert gram is not None and cross is not None
        share = 1.0 if writer else READER_SHARE
        damping = damping_of(damping, len(gram), count)
        targets = {name: self.target(name, gram, cross, pull, share, damping) for name in group}
        return {name: Problem(gram, target, count) for name, target in targets.items()}

    def target(
        self, name: str, gram: Tensor, cross: Tensor, pull: Tensor | None, share: float, damping: float
    ) -> Tensor:
        """W* = W + (share W (X X~^T - X~ X~^T) + D X~^T) (X~ X~^T)^-1, with D the residual stream's difference."""
        weight = dense_weight(self.model.get_submodule(name)).detach().double()
        image = share * (weight @ (cross - gram).double())
        if pull is not None:
            image += pull.double()
        root = cholesky(damped(gram, damping).double())
        return (weight + torch.cholesky_solve(image.mT, root).mT).float()

    def inputs_of(
        self, block: nn.Module, name: str, hidden: Tensor, call: Call, outputs_of: list[str]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What a layer is handed in the block as it is now, and what the named earlier layers put out."""
        written: dict[str, Tensor] = {}

        def stop(x: Tensor) -> None:
            raise ReachedBlock(x)

        handles = [self.on_input(name, stop)]
        handles += [self.on_output(key, partial(keep_as, written, key)) for key in outputs_of]
        try:
            with hooked(handles):
                self.forward(block, hidden, call)
        except ReachedBlock as reached:
            return reached.hidden, written
        return None, written

    def on_input(self, name: str, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Has `see` called with what the layer is handed; returns the handle to remove."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else next(iter(kwargs.values())))

        return self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    def on_output(self, name: str, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Likewise with what it puts out."""
        return self.model.get_submodule(name).register_forward_hook(lambda module, args, out: see(out))


def plain_problem(inputs: list[Tensor], real: list[Tensor | None]) -> Problem:
    """With all inputs of a layer, which may run several times in a run of its block; in order of the runs."""
    calls, odd = divmod(len(inputs), len(real))
    rows = [rows_of(x, None if odd else real[i // calls]) for i, x in enumerate(inputs)]
    return Problem(reduce(torch.add, (x.mT @ x for x in rows)), rows=sum(map(len, rows)))


def keep(kept: list[Tensor], x: Tensor) -> None:
    # a copy, since what runs next may write into x
    kept.append(x.clone())


def keep_as(kept: dict[str, Tensor], name: str, x: Tensor) -> None:
    kept[name] = x.clone()
