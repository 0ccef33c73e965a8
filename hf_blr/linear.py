"""The module that takes the place of `nn.Linear` and `Conv1D`; each structure has a subclass in its folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.dense import is_transposed, stored_bias, stored_weight
from hf_blr.formats import PLAIN, FactorInBits, Factors, Format
from hf_blr.formats.holder import stand_alone
from hf_blr.formats.values import check_fit
from hf_blr.multiplied import MultipliedOut
from hf_blr.ops.dispatch import compute_dtype
from hf_blr.ops.rules.bits import NUMBERS
from hf_blr.structures import BLRSpec, structure_named


class BLRLinear(MultipliedOut):
    """A linear layer whose matrix is stored as block low-rank factors.

    Not an `nn.Linear` subclass: code that merges adapters into, quantises or re-initialises an `nn.Linear` would write
    to a dense weight that does not exist.

    Factors that are kept in bits are read by kernels for bits where the rule in `ops.rules.bits` says so; else they
    become numbers of the input's dtype in each forward, whatever then multiplies them.

    Args:
        spec: the structure and the sizes of the layer.
        bias: whether there is a bias `[N]`.
        transposed: whether it replaces a `Conv1D`, which stores its weight `[K, N]`.
        device, dtype: of the factors; of those that are kept in bits, the dtype that they stand for.
        storage: the format in which factors are kept.

    Raises:
        TypeError: if the spec is of another structure than the class.
    """

    #: (group, place in it) once `hf_blr.fuse` has made this one of several layers that run together
    group: tuple[Any, int] | None = None
    #: of `ops.activations.ACTIVATIONS`, applied to the output: where `hf_blr.fuse` made the last stage do it
    activation: str = ""
    #: its factors are wider than the numbers that they multiply, and come to each product in the dtype of these
    masters: bool = False
    #: multiplies in float8 while it trains: where `finetune.float8` opened it
    float8: bool = False
    #: (what it multiplies with then, its place there)
    float8_group: tuple[Any, int] | None = None
    #: of `ops.dispatch.IMPLS`, for this module alone and in every thread; "" is what `use_impl` says
    impl: str = ""

    @staticmethod
    def from_spec(spec: BLRSpec, **kwargs: Any) -> BLRLinear:
        """The module class that belongs to the spec's structure, freshly initialised."""
        return structure_named(spec.structure).load("module")(spec, **kwargs)

    @staticmethod
    def from_factors(
        spec: BLRSpec,
        stored: dict[str, Tensor],
        bias: Tensor | None = None,
        transposed: bool = False,
        storage: Format = PLAIN,
        dtype: torch.dtype | None = None,
    ) -> BLRLinear:
        """A module holding these tensors, of this dtype where all its factors are kept in bits.

        Raises:
            ValueError: where a tensor is missing or misshapen.
        """
        shapes = {name: tuple(t.shape) for name, t in stored.items()}
        wanted = {name: t.shape for name, t in storage.stored(spec).items()}
        if shapes != wanted:
            raise ValueError(f"{spec.structure} factors must have the shapes {wanted}, got {shapes}")
        module = BLRLinear.from_spec(
            spec, bias=bias is not None, transposed=transposed, device="meta", dtype=dtype, storage=storage
        )
        for name, value in (stored if bias is None else {**stored, "bias": bias}).items():
            module.put(name, value.detach())
        return module

    @staticmethod
    def from_fit(spec: BLRSpec, factors: Factors, like: nn.Module, storage: Format = PLAIN) -> BLRLinear:
        """A module with fitted factors in the place of a layer: in its dtype, device and mode, and with its bias.

        Args:
            spec: the sizes that were fitted.
            factors: of `factorize.Factors`; in `formats.Codes` where a fit has chosen codes and scales itself.
            like: a dense layer or a BLR layer.
            storage: the format in which the factors are kept; what comes as numbers is rounded to the nearest codes.

        Raises:
            ValueError: if a number is too large for the dtype.
        """
        if isinstance(like, BLRLinear):
            dtype, device, transposed = like.dtype, like.device, like.transposed
        else:
            weight = stored_weight(like)
            dtype, device, transposed = weight.dtype, weight.device, is_transposed(like)
        stored = storage.pack(spec, factors, dtype, device)
        check_fit(spec, storage, stored)
        module = BLRLinear.from_factors(spec, stored, stored_bias(like), transposed, storage, dtype)
        return module.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`."""
        self.look_at_indices()
        if self.group is not None:
            group, index = self.group
            out = group.output(index, x)
            if out is not None:
                return out
        # by the mode and not by gradients, so that a checkpointed block computes the same twice
        if self.float8 and self.training:
            if self.float8_group is not None:
                group, index = self.float8_group
                out = group.output(index, x)
                if out is not None:
                    return out
            return ops.linear_in_float8(self.spec.structure, x, self.operands(x), self.bias, self.impl or None)
        found = self.route_in_bits(x)
        if found != NUMBERS:
            return self.run_in_bits(found, x)
        return ops.linear(self.spec.structure, x, self.operands(x), self.bias, self.impl or None, self.activation)

    def look_at_indices(self) -> None:
        """Before they are used: settles indices that were written to since they were last looked at."""
        if not torch.compiler.is_compiling() and self.guard.written(self):
            self.settle_indices()

    def operands(self, x: Tensor) -> list[Tensor]:
        """The tensors that the ops take, for inputs of x's dtype."""
        dtype = compute_dtype(x)
        tensors = self.tensors(dtype).values()
        return [t.to(dtype) if self.masters and t.is_floating_point() else t for t in tensors]

    @property
    def in_training(self) -> bool:
        """Whether factors in bits are in the form that trains, without codes."""
        return not all(isinstance(held, FactorInBits) for held in self.children())

    def route_in_bits(self, x: Tensor) -> str:
        """What of `ops.rules.bits` this layer runs on x `[..., K]`."""
        form = self.storage.form
        if form is None or self.in_training:
            return NUMBERS
        return ops.route_in_bits(self.spec, form, x, [*self.factors().values(), self.bias], self.impl or None)

    def run_in_bits(self, found: str, x: Tensor, cast: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x `[..., K]` -> `[..., N]` by kernels that read codes and scales; cast: of x, where it is there already."""
        return ops.linear_in_bits(found, self.spec.structure, x, self.held(), self.bias, self.activation, cast)

    def train(self, mode: bool = True) -> BLRLinear:
        """Training ends what `hf_blr.fuse` began: fused optimizers want parameters without gaps between their rows."""
        if mode:
            self.stand_alone()
        if mode and self.training:
            # a trainer asks for it before each step, and comparing indices waits for the GPU
            self.look_at_indices()
        else:
            self.settle_indices()
        return super().train(mode)

    def stand_alone(self) -> None:
        """Undo what `hf_blr.fuse` did: no activation, no siblings, and parameters with memory of their own again."""
        self.activation = ""
        if self.group is not None:
            self.group = None
            for parameter in self.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.group is not None and not keep_vars:
            stand_alone(destination, prefix, dict(self.named_parameters(recurse=False)))

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled module stands alone: its siblings are not copied with it
        return {name: value for name, value in self.__dict__.items() if name not in ("group", "float8_group")}

    def extra_repr(self) -> str:
        spec, b = self.spec, self.spec.num_blocks
        blocks = "" if b == (1, 1) else f", num_blocks={b}"
        kept = "" if self.storage == PLAIN else f", storage={self.storage.name}"
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, rank={spec.rank}{blocks}, "
            f"bias={self.bias is not None}, ratio={spec.ratio:.3f}{kept}"
        )


def blr_modules(model: nn.Module) -> dict[str, BLRLinear]:
    """{name: module} of every BLR module in the model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BLRLinear)}
