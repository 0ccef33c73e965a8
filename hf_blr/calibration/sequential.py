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
from collections.abc import Callable, Iterator, MutableSequence, Sequence

from torch import Tensor, nn

from hf_blr.calibration.aim import Aim
from hf_blr.calibration.arguments import with_own_state
from hf_blr.calibration.blockwise import Segment
from hf_blr.calibration.calls import Call
from hf_blr.calibration.joint import BlockReport
from hf_blr.calibration.problem import Problem, plain_problem, problems_of
from hf_blr.calibration.regression import Regression
from hf_blr.calibration.routed import pooled
from hf_blr.calibration.trace import Piece
from hf_blr.calibration.watched import DenseRun, WatchedChain
from hf_blr.dense import at_hand, dense_weight, feature_sizes
from hf_blr.experts import lies_in_experts
from hf_blr.factorize.options import damping_of

logger = logging.getLogger(__name__)

#: how much of the way from W to W* a layer goes that does not write to the residual stream. The whole way is the best
#: for its own output, but shrinks it (X~ is a noisy X); half the way gave the lower perplexity at every size tried
READER_SHARE = 0.5
#: (name, block, aim, what entered, what should leave), as `refine_block` takes them
AfterBlock = Callable[[str, nn.Module, Aim, Sequence[Tensor], Sequence[Tensor]], BlockReport | None]


class SequentialChain(WatchedChain):
    """Runs the dense and the compressed model side by side through chains of blocks."""

    def problems(self, damping: float | None, after_block: AfterBlock | None = None) -> Iterator[dict[str, Problem]]:
        """{layer: Problem} for the layers that share an input, one such group after the other.

        The caller must have replaced the layers of a group when it asks for the next. What enters a segment behind the
        first, and what its blocks are called with besides, comes from the model compressed so far. Finished layers come
        without anything to fit, to be put in place; through finished blocks both models run once, and no more.

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
            layers = [name for names in segment.groups.values() for name in names]
            if all(block in self.progress.blocks for block in segment.groups):
                yield self.progress.problems(layers)
            elif untouched:
                hidden = self.store.list(piece.hidden)
                compressed = Piece(piece.blocks, hidden, with_own_state(piece.calls), piece.batch_of)
                yield from self.segment_problems(segment, compressed, damping, after_block)
            elif (again := self.retraced_by_all(segment)) is not None:
                yield from self.segment_problems(segment, again, damping, after_block)
            else:
                logger.warning(
                    "%s runs otherwise in the model compressed so far: its layers are fitted on the dense model's "
                    "inputs",
                    piece.blocks[0],
                )
                left = self.progress.problems(layers)
                for grams in self.run(segment):
                    experts = [name for name in grams if lies_in_experts(self.model, name)]
                    left = {name: problem for name, problem in left.items() if name not in grams}
                    yield pooled(problems_of(grams), experts)
                yield left
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
            if prefix in self.progress.blocks:
                left = (self.forward(block, x, call) for x, call in zip(entered, dense_calls, strict=True))
                entered = self.store.list(left)
                yield self.progress.problems(names)
                if segment.piece.calls:
                    self.pass_on(prefix, hidden, calls)
                continue
            dense = self.run_dense(block, prefix, names, entered, dense_calls, segment.real)
            real = [masks.get(prefix) for masks in segment.real]
            aim = self.aim(block, calls, real)
            wanted = aim.wanted(hidden, dense.left) if after_block is not None else []
            experts = [name for name in names if lies_in_experts(self.model, name)]
            for group in dense.groups:
                if group[0] in experts:
                    continue
                if self.progress.has_all(group):
                    yield self.progress.problems(group)
                else:
                    yield self.group_problems(block, calls, dense, group, hidden, damping)
            if experts and self.progress.has_all(experts):
                yield self.progress.problems(experts)
            elif experts:
                # the router sends them other tokens in the compressed model: there is nothing to regress on
                inputs = {name: dense.inputs[name] for name in experts if name in dense.inputs}
                masks = {name: [each.get(name) for each in segment.real] for name in inputs}
                problems = {name: plain_problem(x, masks[name], self.processes) for name, x in inputs.items()}
                yield pooled(problems, experts)
            dense.inputs.clear()
            # a layer that is a block by itself has another in its place now
            block = self.model.get_submodule(prefix)
            report = None
            if after_block is not None:
                report = after_block(prefix, block, aim, hidden, wanted)
            self.progress.block_done(prefix, block, report)
            if segment.piece.calls:
                self.pass_on(prefix, hidden, calls)
            entered = dense.left

    def retraced_by_all(self, segment: Segment) -> Piece | None:
        """`retraced`, None in all processes if it is in one."""
        again = self.retraced(segment)
        return again if all(self.processes.gathered(again is not None)) else None

    def aim(self, block: nn.Module, calls: list[Call], real: list[Tensor | None]) -> Aim:
        """What the block is refined towards."""
        return Aim(self, block, calls, real)

    def regression(self, writes: bool) -> Regression:
        """An empty one, for layers that write to the residual stream or do not."""
        return Regression(1.0 if writes else READER_SHARE, self.processes)

    def pass_on(self, prefix: str, hidden: MutableSequence[Tensor], calls: list[Call]) -> None:
        """Replaces what enters a block by what leaves it as it is now, run by run."""
        block = self.model.get_submodule(prefix)
        for i, x in enumerate(hidden):
            hidden[i] = self.forward(block, x, calls[i])

    def group_problems(
        self,
        block: nn.Module,
        calls: list[Call],
        dense: DenseRun,
        group: list[str],
        compressed: Sequence[Tensor],
        damping: float | None,
    ) -> dict[str, Problem]:
        """The regressions of one group, from all batches."""
        writes = group[0] in dense.written and len(group) == 1
        # what it reads must be gone before the regression, whose matrices are the largest of all
        sums = self.sums(block, calls, dense, group[0], compressed, writes)
        if not all(self.processes.gathered(sums is not None)):
            # a layer that runs more than once, or experts that see other tokens now: there is nothing to regress on
            inputs, real = dense.inputs[group[0]], [masks.get(group[0]) for masks in dense.real]
            return dict.fromkeys(group, plain_problem(inputs, real, self.processes))
        assert sums is not None
        sums.gather()
        # there is a batch, or no block would have been traced
        assert sums.gram is not None
        gram, count = sums.gram, sums.rows
        if not gram.any():
            # behind a norm that is zero, say: any weight does
            return dict.fromkeys(group, Problem(gram, rows=count))
        # each process for its share of the rows of W
        weights = {name: self.own_rows(name) for name in group}
        try:
            targets = sums.targets(weights, damping_of(damping, len(gram), count))
        except ValueError as error:
            raise ValueError(f"{group[0]}: {error}") from None
        sizes = {name: feature_sizes(self.model.get_submodule(name))[1] for name in group}
        return {
            name: Problem(gram, self.processes.whole(target, sizes[name]), count) for name, target in targets.items()
        }

    def sums(
        self,
        block: nn.Module,
        calls: list[Call],
        dense: DenseRun,
        name: str,
        compressed: Sequence[Tensor],
        writes: bool,
    ) -> Regression | None:
        """Those of all batches, for the first layer of a group; None where its inputs in both models are not alike."""
        sums, alike = self.regression(writes), len(dense.inputs[name]) == len(compressed)
        earlier = list(dense.written)[: list(dense.written).index(name)] if writes else []

        def add(i: int, hidden: Tensor) -> bool:
            reached, written = self.inputs_of(block, name, hidden, calls[i], earlier)
            wanted = dense.inputs[name][i]
            if reached is None or reached.shape != wanted.shape:
                return False
            gap: Tensor | None = None
            if writes:
                gap = dense.entered[i].float() - hidden.float()
                for other in earlier:
                    gap += dense.written[other][i].float() - written[other].float()
            sums.add(wanted, reached, dense.real[i].get(name), gap)
            return True

        # a call each, so that nothing of one batch is held while the next runs
        return sums if alike and all(add(i, hidden) for i, hidden in enumerate(compressed)) else None

    def own_rows(self, name: str) -> Tensor:
        """This process' share of the rows of W `[N, K]`, in float64."""
        layer = self.model.get_submodule(name)
        with at_hand(layer):
            weight = dense_weight(layer).detach()
            return weight[self.processes.share(len(weight))].double()
