"""Projections that read the same input (q, k and v; gate and up), run together: `fuse` and `unfuse`."""

from __future__ import annotations

import itertools
import re

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.linear import BLRLinear
from hf_blr.ops.dispatch import compute_dtype, resolve_impl

#: names under which models keep projections that are handed one tensor
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: modules whose keys and values come from somewhere else than their queries
CROSS_ATTENTION = re.compile(r"cross_?attention|cross_attn|encoder_attn|EncDecAttention", re.IGNORECASE)
#: where an input carries what its other siblings will ask for: it dies with the input, and no thread sees another's
MARK = "_hf_blr_siblings"


def fuse(model: nn.Module, together: tuple[tuple[str, ...], ...] = TOGETHER) -> list[tuple[str, ...]]:
    """Run projections that share their input together, for faster inference on a GPU.

    The model stays what it was: each module keeps its parameters, which now lie side by side in one buffer, without
    a copy; saving, loading, adapters, training and `to_dense` work as before. The first of the projections that is
    handed a tensor computes the outputs of all, the others pick theirs up. Moving or casting the model afterwards is
    right but undoes the gain: call `fuse` again.

    Used without gradients only, and not in eager code under `torch.inference_mode`, where writes to a tensor cannot be
    noticed: use `torch.no_grad` there. In code under `torch.compile`, nothing may write in place into the input between
    the calls of the projections; no transformers model does.

    Args:
        model: holds BLR modules.
        together: groups of names; modules of these names in one parent, which are not its cross-attention, run
            together if they have the same structure, blocks, input size, dtype, device, and all or none a bias.

    Returns:
        The names of the modules of each group.

    Raises:
        ValueError: if the model has no BLR module.
    """
    if not any(isinstance(module, BLRLinear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no BLR modules to fuse; compress it first")
    found = []
    for parent_name, parent in list(model.named_modules()):
        if CROSS_ATTENTION.search(parent_name.rpartition(".")[2]) or CROSS_ATTENTION.search(type(parent).__name__):
            continue
        children = dict(parent.named_children())
        for names in together:
            # PEFT keeps the layer under an adapter as base_layer
            modules = [getattr(children.get(name), "base_layer", children.get(name)) for name in names]
            if fit_together(modules):
                pack([dict(module.named_parameters(recurse=False)) for module in modules])
                siblings = Siblings(modules)
                for index, module in enumerate(modules):
                    module.siblings = siblings, index
                found.append(tuple(f"{parent_name}.{name}".lstrip(".") for name in names))
    return found


def unfuse(model: nn.Module):
    """Undo `fuse`: each parameter gets memory of its own again."""
    for module in model.modules():
        if isinstance(module, BLRLinear) and module.siblings is not None:
            module.siblings = None
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def fit_together(modules: list) -> bool:
    """Whether these are BLR modules whose factors can be read as those of one wide layer."""
    if not all(isinstance(module, BLRLinear) for module in modules) or len(set(modules)) < len(modules):
        return False
    kinds = {
        (type(m), m.spec.num_blocks, m.in_features, m.bias is None, *{(p.dtype, p.device) for p in m.parameters()})
        for m in modules
    }
    return len(kinds) == 1 and len(next(iter(kinds))) == 5 and not modules[0].v.is_meta


@torch.no_grad()
def pack(layers: list[dict[str, Tensor]]):
    """Move factors side by side, in place: all v along their ranks; the others, where neighbours have one shape.

    Args:
        layers: {"u", ("s",) "v", ("bias"): tensor} of each layer, in the order in which they run.
    """
    for name in layers[0]:
        tensors = [layer[name] for layer in layers]
        if name == "v":
            # [B1, rows, P], or low-rank's [rows, K]
            move_together(tensors, tensors[0].dim() - 2)
        else:
            for _, run in itertools.groupby(tensors, key=lambda t: t.shape):
                move_together(list(run), 0)


def move_together(tensors: list[Tensor], dim: int):
    """Give the tensors the parts of one buffer along `dim`, with the values they have."""
    if len(tensors) > 1:
        buffer = torch.cat([t.data for t in tensors], dim)
        for tensor, part in zip(tensors, buffer.split([t.shape[dim] for t in tensors], dim), strict=True):
            tensor.data = part


class Siblings:
    """What the modules of a group share: the way to compute all of their outputs at once."""

    def __init__(self, modules: list[BLRLinear]):
        self.modules = modules

    def output(self, index: int, x: Tensor) -> Tensor | None:
        """The output of module `index` on x `[..., K]`; None if it is better computed alone.

        Outputs wait on x itself. They are used only if nothing that they depend on has changed since, and are gone
        with x, or as soon as the last one is taken.
        """
        group, waiting = getattr(x, MARK, None) or (None, {})
        if group is self and not self.wants_gradient(index, x):
            out, state = waiting.pop(index, (None, None))
            if not waiting:
                setattr(x, MARK, None)
            if out is not None and state == self.state(index, x):
                return out
        if not self.worthwhile(x):
            return None
        waiting = {i: (out, self.state(i, x)) for i, out in enumerate(self.compute(x))}
        out, _ = waiting.pop(index)
        setattr(x, MARK, (self, waiting))
        return out

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        factors = [tuple(module.factors().values()) for module in self.modules]
        biases = [module.bias for module in self.modules]
        return ops.siblings_linear(self.modules[0].spec.structure, x, factors, biases)

    def worthwhile(self, x: Tensor) -> bool:
        """Whether kernels run, no gradient is wanted, and a change of x would be noticed."""
        if any(self.wants_gradient(i, x) for i in range(len(self.modules))):
            return False
        if not torch.compiler.is_compiling() and x.is_inference():
            return False
        tensors = [t for module in self.modules for t in module.parameters(recurse=False)]
        return resolve_impl(None, "siblings", x, *tensors) == "triton"

    def wants_gradient(self, index: int, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for p in self.modules[index].parameters(recurse=False))

    def state(self, index: int, x: Tensor) -> tuple | None:
        """What an output depends on, to be compared; compiled code has guards of its own."""
        if torch.compiler.is_compiling():
            return None
        parameters = self.modules[index].parameters(recurse=False)
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        return (x._version, compute_dtype(x), ops.current_impl(), versions)
