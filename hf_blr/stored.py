"""What a compressed layer keeps: its tensors by name, in a format, with the checks of what comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.formats import PLAIN, Bits, FactorInBits, Format
from hf_blr.formats.indices import IndexGuard, is_average
from hf_blr.formats.values import fault
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, INDEX, BLRSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class StoredFactors(nn.Module):
    """The factors, indices and bias of a layer.

    Args:
        spec: the sizes; its type picks the subclass when built through `BLRLinear.from_spec`.
        bias: whether there is a bias `[N]`.
        transposed: the layer replaces a `Conv1D`, which stores its weight `[K, N]`.
        device, dtype: of the factors; of those that are kept in bits, the dtype that they stand for.
        storage: the format in which factors are kept.
    """

    spec_class: type[BLRSpec]
    #: of most structures: parameters, or modules that hold them in bits; `tensors` is there for all
    u: Any
    v: Any
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: BLRSpec,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        storage: Format = PLAIN,
    ):
        super().__init__()
        if type(spec) is not self.spec_class:
            raise TypeError(f"{type(self).__name__} needs a {self.spec_class.__name__} spec, got {spec}")
        # now, since torch.compile traces no import
        implementation_of(spec.structure)
        self.transposed = transposed
        self.make(spec, storage, device, dtype)
        bias_value = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias_value)
        self.reset_parameters()
        self.settle_indices()

    def make(
        self,
        spec: BLRSpec,
        storage: Format,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        leading: tuple[int, ...] = (),
    ) -> None:
        """Makes room for factors and indices; leading: axes before those of the spec."""
        self.spec, self.storage = spec, storage
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, (shape, kind) in spec.tensors().items():
            shape = (*leading, *shape)
            if isinstance(storage, Bits) and name in storage.in_bits(spec):
                self.add_module(name, FactorInBits(storage, shape, device))
                continue
            value = torch.empty(shape, device=device, dtype=storage.dtype_of(kind, dtype))
            if kind == FACTOR:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.guard = IndexGuard()

    def put(self, key: str, value: Tensor) -> None:
        """Makes this the stored tensor or bias of that state-dict key."""
        owner, _, name = key.rpartition(".")
        holder = self.get_submodule(owner)
        # what is kept in bits does not train
        setattr(holder, name, nn.Parameter(value, requires_grad=not owner) if name in holder._parameters else value)

    def reset_parameters(self) -> None:
        """Random factors whose product has the variance 1 / (3 K) of a fresh `nn.Linear`."""
        if self.device.type == "meta":
            return
        for index in self.indices().values():
            index.copy_(torch.arange(len(index)))
        for name, std in self.initial_std().items():
            held = getattr(self, name)
            if isinstance(held, FactorInBits):
                held.take(held.storage.nearest(torch.randn(held.shape, device=self.device) * std))
            else:
                nn.init.normal_(held, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def initial_std(self) -> dict[str, float]:
        """{factor: standard deviation}; each output sums `v.shape[-1] * u.shape[-1]` products."""
        return {"u": (1 / (3 * self.u.shape[-1])) ** 0.5, "v": self.v.shape[-1] ** -0.5}

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors; where all are kept in bits, the dtype that they stand for."""
        return next((factor.dtype for factor in self.factors().values()), self._dtype)

    @property
    def device(self) -> torch.device:
        """Of the stored tensors."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Numbers that the layer stands for, the bias included."""
        return self.spec.num_parameters + (0 if self.bias is None else self.out_features)

    def stored(self) -> dict[str, Tensor]:
        """{state-dict key: tensor} of all that the layer keeps but its bias."""
        found: dict[str, Tensor] = {}
        for name in self.spec.names():
            held = getattr(self, name)
            in_bits = isinstance(held, nn.Module)
            found |= {f"{name}.{leaf}": part for leaf, part in held.parts().items()} if in_bits else {name: held}
        return found

    def factors(self) -> dict[str, nn.Parameter]:
        """{"u", ("s",) "v"}: the factors that are parameters, in the order in which the ops take them; none in bits."""
        in_bits = self.storage.in_bits(self.spec)
        return {name: getattr(self, name) for name in self.spec.names(FACTOR) if name not in in_bits}

    def indices(self) -> dict[str, Tensor]:
        """The integers that belong to the factors, by name; most structures have none."""
        return {name: getattr(self, name) for name in self.spec.names(INDEX)}

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Factors and indices: all that the ops take. Factors kept in bits come in `dtype`; None: in the layer's."""
        held = {name: getattr(self, name) for name in self.spec.names()}
        return {name: part(dtype or self.dtype) if isinstance(part, nn.Module) else part for name, part in held.items()}

    def held(self) -> list[Tensor | ops.InBits]:
        """Factors and indices in the ops' order; those in bits as codes and scales."""
        parts = [getattr(self, name) for name in self.spec.names()]
        return [part() if isinstance(part, FactorInBits) else part for part in parts]

    def settle_indices(self) -> None:
        """Puts right what a moving average has made of the indices.

        Raises:
            ValueError: as `IndexGuard.settle`, or if an average has reached codes, which nothing puts right.
        """
        self.guard.settle(self.indices())
        for held in self.children():
            if isinstance(held, FactorInBits):
                held.look()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle_indices()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self.settle_indices()
        for name, index in self.indices().items():
            value = state_dict.get(prefix + name)
            if value is not None and fault(INDEX, value) is not None and is_average(value, index):
                state_dict[prefix + name] = index
        # here and not after the load, so that nothing wrong gets in
        wrong = [
            f"{prefix}{name}: {problem}"
            for name, (_, kind) in self.storage.stored(self.spec).items()
            if (value := state_dict.get(prefix + name)) is not None and (problem := fault(kind, value)) is not None
        ]
        if wrong:
            lists[-1].extend(wrong)
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
            self.settle_indices()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # what a cast does to a number, it does to those that the factors in bits stand for
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        applied: Any = super()._apply(fn, recurse)
        return applied
