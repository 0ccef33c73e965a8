"""What layers that are handed one tensor, one after the other, share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_blr import ops
from hf_blr.linear import BLRLinear
from hf_blr.ops.cast import cast_rows
from hf_blr.ops.dispatch import compute_dtype, resolve_impl
from hf_blr.ops.rules.bits import FLOAT8, PACKED
from hf_blr.structures import structure_named

#: where an input carries what its other siblings will ask for: it dies with the input, and no thread sees another's
MARK = "_hf_blr_group"
#: after so many inputs in a row that not every sibling was handed, a group has proven to be none
PATIENCE = 8

#: (group, {module: (its output, what that depends on)})
Mark = tuple["ProjectionGroup | None", dict[int, tuple[Tensor | None, list[Any] | None]]]


class ProjectionGroup:
    """What the modules of a group share: the way to compute all of their outputs at once."""

    def __init__(self, modules: list[BLRLinear]):
        self.modules = modules
        #: inputs since the last one that every sibling was handed
        self.unclaimed = 0

    def output(self, index: int, x: Tensor) -> Tensor | None:
        """The output of module `index` on x `[..., K]`; None if it is better computed alone.

        Outputs wait on x itself. They are used only if nothing that they depend on has changed since, and are gone
        with x, or as soon as the last one is taken.
        """
        mark: Mark = getattr(x, MARK, None) or (None, {})
        group, waiting = mark
        if group is self and self.may_wait(index, x):
            out, state = waiting.pop(index, (None, None))
            if not waiting:
                self.close(x)
            if out is not None and state == self.state(index, x):
                return out
        if not self.worthwhile(x):
            return None
        waiting = {i: (out, self.state(i, x)) for i, out in enumerate(self.compute(x))}
        out, _ = waiting.pop(index)
        setattr(x, MARK, (self, waiting))
        if not torch.compiler.is_compiling():
            self.unclaimed += 1
        return out

    def may_wait(self, index: int, x: Tensor) -> bool:
        """Whether what waits on x can be the output of module `index`."""
        return not self.wants_gradient(index, x)

    def close(self, x: Tensor) -> None:
        """The last sibling has taken its output."""
        if torch.compiler.is_compiling():
            # compiled code knows no delattr
            setattr(x, MARK, None)
        else:
            # another thread may have been faster
            x.__dict__.pop(MARK, None)
            self.unclaimed = 0

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        structure, factors, biases = self.layers()
        return ops.grouped_linear(structure, x, factors, biases)

    def gated(self, x: Tensor, activation: str) -> Tensor | None:
        """activation(first) * second `[..., N]` on x; None if it is better computed apart."""
        if not self.worthwhile(x):
            return None
        structure, factors, biases = self.layers()
        return ops.gated_linear(structure, x, factors, biases, activation)

    def layers(self) -> tuple[str, list[tuple[Tensor, ...]], list[Tensor | None]]:
        """(structure, factors, biases), as the ops take them."""
        factors: list[tuple[Tensor, ...]] = [tuple(module.factors().values()) for module in self.modules]
        return self.modules[0].spec.structure, factors, [module.bias for module in self.modules]

    def worthwhile(self, x: Tensor) -> bool:
        """Whether kernels run, no gradient is wanted, and a change of x would be noticed.

        Never where a module has an implementation of its own: what runs together has one.
        """
        if not self.may_share(x):
            return False
        tensors = [t for module in self.modules for t in module._parameters.values()]
        return resolve_impl(None, x, tensors) == "triton"

    def may_share(self, x: Tensor) -> bool:
        """`worthwhile`, but for the kernels."""
        if any(module.impl for module in self.modules):
            return False
        if self.unclaimed >= PATIENCE or any(self.wants_gradient(i, x) for i in range(len(self.modules))):
            return False
        return torch.compiler.is_compiling() or not x.is_inference()

    def wants_gradient(self, index: int, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for p in self.modules[index].parameters(recurse=False))

    def state(self, index: int, x: Tensor) -> list[Any] | None:
        """What an output depends on, to be compared; compiled code has guards of its own."""
        if torch.compiler.is_compiling():
            return None
        state: list[Any] = [x._version, compute_dtype(x), self.modules[index].impl or ops.current_impl()]
        if x.is_cuda:
            state.append(torch.cuda.current_stream(x.device).cuda_stream)
        for p in self.modules[index].parameters():
            state += p.data_ptr(), None if p.is_inference() else p._version
        return state


class GroupInBits(ProjectionGroup):
    """Layers whose factors are kept in bits.

    At few tokens those that are alike run together; at many, layers in float8 share the cast of their input to it, and
    those that are alike their first stage, where the structure has kernels for that.
    """

    def __init__(self, modules: list[BLRLinear], alike: bool):
        super().__init__(modules)
        self.alike = alike

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        structure = self.modules[0].spec.structure
        if self.modules[0].route_in_bits(x) == PACKED:
            return ops.grouped_in_bits(structure, x, *self.layers_in_bits())
        cast = cast_rows(x)
        if self.alike and structure_named(structure).float8_grouped:
            return ops.grouped_float8(structure, cast, x.shape, compute_dtype(x), *self.layers_in_bits())
        return tuple(module.run_in_bits(FLOAT8, x, cast) for module in self.modules)

    def gated(self, x: Tensor, activation: str) -> Tensor | None:
        if not self.worthwhile(x) or self.modules[0].route_in_bits(x) != PACKED:
            return None
        return ops.gated_in_bits(self.modules[0].spec.structure, x, *self.layers_in_bits(), activation)

    def layers_in_bits(self) -> tuple[list[list[Tensor | ops.InBits]], list[Tensor | None]]:
        """(tensors, biases), as the ops take them."""
        return [module.held() for module in self.modules], [module.bias for module in self.modules]

    def worthwhile(self, x: Tensor) -> bool:
        if not self.may_share(x):
            return False
        found = {module.route_in_bits(x) for module in self.modules}
        return found == {FLOAT8} or (self.alike and found == {PACKED})
