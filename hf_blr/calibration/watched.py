"""A block that is run by itself, and what its layers are handed and put out while it runs."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blr.calibration.blockwise import BlockChain
from hf_blr.calibration.calls import Call, ReachedBlock, handed, hooked
from hf_blr.calibration.residual import residual_writers
from hf_blr.calibration.streams import Masks
from hf_blr.dense import is_dense_linear


@dataclass
class DenseRun:
    """What the dense block did, run by run, on its own inputs."""

    entered: Sequence[Tensor]
    #: the positions that count
    real: list[Masks]
    left: MutableSequence[Tensor]
    #: layers that were handed the same tensor, in the order of the calls
    groups: list[list[str]] = field(default_factory=list)
    #: {first layer of a group: its inputs}
    inputs: dict[str, MutableSequence[Tensor]] = field(default_factory=dict)
    #: {layer that adds its output to the residual stream: its outputs}, in the order of the calls
    written: dict[str, MutableSequence[Tensor]] = field(default_factory=dict)


class WatchedChain(BlockChain):
    """Chains of blocks whose layers can be watched."""

    def run_dense(
        self,
        block: nn.Module,
        prefix: str,
        names: list[str],
        entered: Sequence[Tensor],
        calls: list[Call],
        real: list[Masks],
    ) -> DenseRun:
        """Passes all that enters through the still dense block."""
        run = DenseRun(entered, real, self.store.list())
        writers: list[str] = []
        if names:
            # a block between others, of which nothing is fitted, has nothing to be looked for
            found = self.survey(block, prefix, names, entered[0], calls[0], real[0].get(prefix))
            # rounding could tell processes different things
            run.groups, writers = self.processes.gathered(found)[0]
        run.inputs = {group[0]: self.store.list() for group in run.groups}
        run.written = {name: self.store.list() for name in writers}
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
            see(handed(args, kwargs))

        return self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    def on_output(self, name: str, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Likewise with what it puts out."""
        return self.model.get_submodule(name).register_forward_hook(lambda module, args, out: see(out))


def keep(kept: MutableSequence[Tensor], x: Tensor) -> None:
    # a copy, since what runs next may write into x
    kept.append(x.clone())


def keep_as(kept: dict[str, Tensor], name: str, x: Tensor) -> None:
    kept[name] = x.clone()
