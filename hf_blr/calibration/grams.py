"""Statistics of a layer's inputs: Gram matrices X^T X, gathered by hooks while batches run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blr.calibration.calls import handed, writes_to
from hf_blr.calibration.padding import real_rows
from hf_blr.calibration.residual import add_product, wide_parts
from hf_blr.calibration.streams import Masks


class Grams(dict[str, Tensor]):
    """{layer: X^T X `[K, K]`}; `rows` says of how many rows X each is, {layer: T}."""

    def __init__(self, grams: dict[str, Tensor], rows: dict[str, int]):
        super().__init__(grams)
        self.rows = rows


class GramCollector:
    """A context manager in which every forward adds the named layers' inputs to their Gram matrices.

    Layers that are handed the very same tensor one after the other (q, k, v; gate and up) share one matrix. It is
    float32, on the device of the input.

    Args:
        modules: {name: layer}; the layer's first argument is `[..., K]`.
        labels: {name: the name under which a layer's Gram is summed}, of layers that are counted together; their rows
            are counted under both names.

    Attributes:
        real: {layer: the positions of the batch that runs next which count}, as `Padding.masks` gives them.
        paused: nothing is added, as while a backward pass runs parts of the model again.
    """

    def __init__(self, modules: dict[str, nn.Module], labels: dict[str, str] | None = None):
        self.modules, self.labels = modules, labels or {}
        self.real: Masks = {}
        self.paused = False
        self._rows: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        # the latest input, its Gram, and the layers that it reached so far
        self._input: Tensor | None = None
        self._writes = 0
        self._gram: Tensor | None = None
        self._size = 0
        self._reached: list[str] = []
        #: {layers that were handed one tensor: sum of its Grams}
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def __enter__(self) -> GramCollector:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._close_group()

    @property
    def grams(self) -> Grams:
        """Those of the layers that ran; the same tensor where layers always shared their input."""
        grams: dict[str, Tensor] = {}
        for names, total in self._sums.items():
            for name in names:
                grams[name] = total if name not in grams else grams[name] + total
        return Grams(grams, self._rows)

    def _hook(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.paused:
                return
            x = handed(args, kwargs)
            if self._input is None or x is not self._input or self._writes != writes_to(x):
                self._close_group()
                rows = real_rows(x.detach(), self.real.get(name))
                # at once: what runs next may write into x
                self._input, self._writes, self._gram, self._size = x, writes_to(x), None, len(rows)
                for (part,) in wide_parts(rows):
                    self._gram = add_product(self._gram, part, part)
            self._reached.append(self.labels.get(name, name))
            for counted in {name, self._reached[-1]}:
                self._rows[counted] = self._rows.get(counted, 0) + self._size

        return count

    def _close_group(self) -> None:
        """Adds the latest Gram to the sum of the layers that shared it."""
        if self._gram is not None:
            names = tuple(self._reached)
            if names in self._sums:
                self._sums[names] += self._gram
            else:
                self._sums[names] = self._gram
        self._input, self._gram, self._reached = None, None, []
