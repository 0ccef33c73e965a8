"""The modules that take the place of `nn.Linear` and `Conv1D`."""

from __future__ import annotations

import math

import torch
from torch import nn

from hf_blr import ops
from hf_blr.dense import build_dense
from hf_blr.ops import reference
from hf_blr.structures import Blast, BLRSpec, LowRank, Monarch, Pivoted


class BLRLinear(nn.Module):
    """A linear layer whose matrix is stored as block low-rank factors.

    Not an `nn.Linear` subclass: code that merges adapters into, quantises or re-initialises an `nn.Linear` would write
    to a dense weight that does not exist. `weight` is there to be read, as the dense matrix.

    Args:
        spec: the sizes; its type picks the subclass when built through `BLRLinear.from_spec`.
        bias: whether there is a bias `[N]`.
        transposed: the layer replaces a `Conv1D`, which stores its weight `[K, N]`.
        device, dtype: of the factors.
    """

    spec_class: type[BLRSpec]
    #: (group, place in it) once `hf_blr.fuse` has made this one of several layers that run together
    siblings: tuple | None = None
    #: of `ops.activations.ACTIVATIONS`, applied to the output: where `hf_blr.fuse` made the last stage do it
    activation: str = ""
    #: of `ops.dispatch.IMPLS`, for this module alone and in every thread; "" is what `use_impl` says
    impl: str = ""

    def __init__(self, spec: BLRSpec, bias=True, transposed=False, device=None, dtype=None):
        super().__init__()
        if type(spec) is not self.spec_class:
            raise TypeError(f"{type(self).__name__} needs a {self.spec_class.__name__} spec, got {spec}")
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.transposed = transposed
        for name, shape in spec.factor_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for name, shape in spec.index_shapes().items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=torch.int32))
        bias_value = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias_value)
        self.reset_parameters()

    @staticmethod
    def from_spec(spec: BLRSpec, **kwargs) -> BLRLinear:
        """The module class that belongs to the spec's structure, freshly initialised."""
        return LINEARS[type(spec)](spec, **kwargs)

    @classmethod
    def from_factors(cls, spec, factors: dict[str, torch.Tensor], bias=None, transposed=False) -> BLRLinear:
        """A module holding these tensors. Raises ValueError where a factor is missing or misshapen."""
        shapes = {name: tuple(t.shape) for name, t in factors.items()}
        wanted = spec.factor_shapes() | spec.index_shapes()
        if shapes != wanted:
            raise ValueError(f"{spec.structure} factors must have the shapes {wanted}, got {shapes}")
        module = cls.from_spec(spec, bias=bias is not None, transposed=transposed, device="meta")
        for name, value in (factors if bias is None else {**factors, "bias": bias}).items():
            module.put(name, value.detach())
        return module

    def put(self, name: str, value: torch.Tensor):
        """Makes this the factor, index or bias of that name."""
        setattr(self, name, value if name in self.spec.index_names else nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` -> `[..., N]`."""
        if self.siblings is not None:
            group, index = self.siblings
            out = group.output(index, x)
            if out is not None:
                return out
        impl = self.impl or None
        return self.function(x, **self.tensors(), bias=self.bias, impl=impl, activation=self.activation)

    def train(self, mode: bool = True):
        """Training ends what `hf_blr.fuse` began: fused optimizers want parameters without gaps between their rows."""
        if mode:
            self.stand_alone()
        return super().train(mode)

    def stand_alone(self):
        """Undo what `hf_blr.fuse` did: no activation, no siblings, and parameters with memory of their own again."""
        self.activation = ""
        if self.siblings is not None:
            self.siblings = None
            for parameter in self.parameters(recurse=False):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def reset_parameters(self):
        """Random factors whose product has the variance 1 / (3 K) of a fresh `nn.Linear`."""
        if self.u.is_meta:
            return
        for name in self.spec.index_names:
            index = getattr(self, name)
            index.copy_(torch.arange(len(index)))
        std = self.initial_std()
        for name, value in self.factors().items():
            nn.init.normal_(value, std=std[name])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def initial_std(self) -> dict[str, float]:
        """{factor: standard deviation}; each output sums `v.shape[-1] * u.shape[-1]` products."""
        return {"u": (1 / (3 * self.u.shape[-1])) ** 0.5, "v": self.v.shape[-1] ** -0.5}

    def factors(self) -> dict[str, nn.Parameter]:
        """{"u", ("s",) "v"}: the parameters in the order in which the ops take them."""
        return {name: getattr(self, name) for name in self.spec.factor_names}

    def indices(self) -> dict[str, torch.Tensor]:
        """The integers that belong to the factors, by name; most structures have none."""
        return {name: getattr(self, name) for name in self.spec.index_names}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors and indices: all that the ops take."""
        return {**self.factors(), **self.indices()}

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix `[N, K]`, differentiable in the factors."""
        return reference.DENSE[self.spec.structure](**self.tensors())

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix as the replaced layer would hold it, detached: for code that only looks at it.

        While a dense checkpoint streams in, a placeholder parameter of this name stands in the module; it is what the
        loader must see then.
        """
        placeholder = self._parameters.get("weight")
        if placeholder is not None:
            return placeholder
        dense = self.dense_weight().detach()
        dense = dense.T if self.transposed else dense
        # transformers' _init_weights re-initialises what does not carry this mark
        dense._is_hf_initialized = True
        return dense

    def to_dense(self) -> nn.Module:
        """The `nn.Linear` (or `Conv1D`) with the same matrix, dtype and device; multiplied out in float32 or better."""
        wide = {n: f.detach().to(torch.promote_types(f.dtype, torch.float32)) for n, f in self.factors().items()}
        weight = reference.DENSE[self.spec.structure](**wide, **self.indices()).to(self.u.dtype)
        dense = build_dense(weight, self.bias, self.transposed)
        dense.train(self.training)
        return dense.requires_grad_(self.u.requires_grad)

    @property
    def num_parameters(self) -> int:
        """Numbers stored, the bias included."""
        return sum(t.numel() for t in (*self.parameters(recurse=False), *self.indices().values()))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.siblings is not None and not keep_vars:
            # files want tensors that are contiguous and share no memory
            for name in dict(self.named_parameters(recurse=False)):
                destination[prefix + name] = destination[prefix + name].clone(memory_format=torch.contiguous_format)

    def __getstate__(self):
        # a copied or pickled module stands alone: its siblings are not copied with it
        return {name: value for name, value in self.__dict__.items() if name != "siblings"}

    def extra_repr(self):
        spec, b = self.spec, self.spec.num_blocks
        blocks = "" if b == (1, 1) else f", num_blocks={b}"
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, rank={spec.rank}{blocks}, "
            f"bias={self.bias is not None}, ratio={spec.ratio:.3f}"
        )


class LowRankLinear(BLRLinear):
    """x v^T u^T + bias; see `structures.LowRank`."""

    spec_class = LowRank
    function = staticmethod(ops.low_rank_linear)


class PivotedLinear(BLRLinear):
    """Low-rank with some inputs passed as they are; see `structures.Pivoted`."""

    spec_class = Pivoted
    function = staticmethod(ops.pivoted_linear)

    def initial_std(self):
        # what enters u has variance 2: an input, and c's sum of the others
        return {"u": (1 / (6 * self.spec.rank)) ** 0.5, "c": max(1, self.c.shape[1]) ** -0.5}


class MonarchLinear(BLRLinear):
    """Block (i, j) of the matrix is u_ij v_ij; see `structures.Monarch`."""

    spec_class = Monarch
    function = staticmethod(ops.monarch_linear)


class BlastLinear(BLRLinear):
    """Block (i, j) of the matrix is u_i diag(s_ij) v_j; see `structures.Blast`."""

    spec_class = Blast
    function = staticmethod(ops.blast_linear)

    def initial_std(self):
        # u sums R products of z, and z sums B1 of them
        return {**super().initial_std(), "s": 1 / math.sqrt(self.spec.num_blocks[0])}


LINEARS: dict[type[BLRSpec], type[BLRLinear]] = {
    cls.spec_class: cls for cls in (LowRankLinear, PivotedLinear, MonarchLinear, BlastLinear)
}
