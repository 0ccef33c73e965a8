"""Statistics of a layer's inputs: Gram matrices X X^T, gathered by hooks while batches run."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GramCollector:
    """A context manager in which every forward adds the named layers' inputs to their Gram matrices.

    Layers that are handed the very same tensor (q, k, v; gate and up) share one matrix. It stands in float32 on the
    device of the layer.

    Args:
        modules: {name: layer}; the layer's first argument is `[..., K]`.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.grams: dict[str, Tensor] = {}
        self._handles: list = []
        self._last: tuple[Tensor, str] | None = None  # the latest input, and the layer that counted it
        self._shares: dict[str, str] = {}  # layer -> the layer whose matrix it uses

    def __enter__(self) -> GramCollector:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def _hook(self, name: str):
        def count(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            if self._last is not None and self._last[0] is x:
                owner = self._last[1]
                if name not in self.grams:
                    self.grams[name], self._shares[name] = self.grams[owner], owner
                if self._shares.get(name) == owner:
                    return
            elif name in self._shares:
                # it shared an input so far and has its own now: the sums part ways here
                del self._shares[name]
                self.grams[name] = self.grams[name].clone()
            self._add(name, x)
            self._last = x, name

        return count

    @torch.no_grad()
    def _add(self, name: str, x: Tensor):
        rows = x.reshape(-1, x.shape[-1]).float()
        if name in self.grams:
            self.grams[name].addmm_(rows.mT, rows)
        else:
            self.grams[name] = rows.mT @ rows
