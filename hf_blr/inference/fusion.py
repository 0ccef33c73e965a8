"""`fuse` and `unfuse`: projections with one input run together, and apply the activation that follows them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.experts import ExpertsLinear
from hf_blr.formats import PLAIN
from hf_blr.inference.attention import restore_attention, use_attention
from hf_blr.inference.epilogues import bring_back, fuse_activations
from hf_blr.inference.grouped import GroupInBits, ProjectionGroup
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.ops import InBits
from hf_blr.ops.rules.bits import CodeForm
from hf_blr.ops.rules.packed import reads_packed
from hf_blr.structures import structure_named

#: names under which models keep projections that are handed one tensor
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: modules whose keys and values come from somewhere else than their queries
CROSS_ATTENTION = re.compile(r"cross_?attention|cross_attn|encoder_attn|EncDecAttention|attn2", re.IGNORECASE)


def fuse(model: nn.Module, together: tuple[tuple[str, ...], ...] = TOGETHER) -> list[tuple[str, ...]]:
    """Run projections that share their input together, and activations inside them, for faster inference on a GPU.

    q, k and v, and gate and up, are computed by one call. The activation of an MLP is applied where the projection
    before it stores its output, which saves a pass over the largest tensor of a block, and so is a gated MLP's product.
    A transformers model that attends by SDPA does so by a kernel of ours where one new token meets a static cache.
    The model stays what it was: each module keeps its parameters, which now lie side by side in one buffer, without
    a copy; saving, loading, adapters and `to_dense` work as before. The first of the projections that is
    handed a tensor computes the outputs of all, the others pick theirs up. Moving or casting the model afterwards is
    right but undoes the gain: call `fuse` again. Projections that turn out to read different tensors after all go back
    to running alone. So do all by `model.train()`: call `fuse` again after training.

    Used without gradients only, and not in eager code under `torch.inference_mode`, where writes to a tensor cannot be
    noticed: use `torch.no_grad` there. In code under `torch.compile`, nothing may write in place into the input between
    the calls of the projections; no transformers model does.

    Args:
        model: holds BLR modules.
        together: groups of names. Modules of these names in one parent that is no cross-attention run together,
            as far as they have the same structure, blocks, format, input size, dtype and device, and all or none a
            bias. In bits they do so up to 32 tokens. At many, those whose factors are kept in fp8 share the cast of
            their input, for which the same input size and device are enough, and low-rank ones their first stage.

    Returns:
        The names of the modules of each group, and those of (projection, activation), which run together too.

    Raises:
        ValueError: if the model has no BLR module.
    """
    if not blr_modules(model):
        raise ValueError(f"{type(model).__name__} has no BLR modules to fuse; compress it first")
    found: list[tuple[str, ...]] = []
    for parent_name, parent in list(model.named_modules()):
        for alike in of_one_kind(parent_name, parent, kind_of, together):
            run_together(list(alike.values()))
            found.append(tuple(f"{parent_name}.{name}".lstrip(".") for name in alike))
        for names in fuse_activations(parent):
            full = tuple(f"{parent_name}.{name}".lstrip(".") for name in names)
            # a gated MLP: the group is there already
            found = [group for group in found if group != full[:-1]] + [full]
    use_attention(model)
    return found


def of_one_kind(
    parent_name: str,
    parent: nn.Module,
    kind_of: Callable[[nn.Module], Hashable | None],
    together: tuple[tuple[str, ...], ...] = TOGETHER,
) -> Iterator[dict[str, Any]]:
    """{name: module} of children that are handed one tensor and are of one kind; none of the kind None."""
    if CROSS_ATTENTION.search(parent_name) or CROSS_ATTENTION.search(type(parent).__name__):
        return
    children = dict(parent.named_children())
    for names in together:
        # PEFT keeps the layer under an adapter as base_layer
        present = [name for name in names if name in children]
        modules: dict[str, Any] = {name: getattr(children[name], "base_layer", children[name]) for name in present}
        for kind in dict.fromkeys(map(kind_of, modules.values())):
            alike = {name: module for name, module in modules.items() if kind_of(module) == kind}
            if kind is not None and len(set(alike.values())) > 1:
                yield alike


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: each parameter gets memory of its own again."""
    restore_attention(model)
    for module in model.modules():
        bring_back(module)
        if isinstance(module, BLRLinear):
            module.stand_alone()


def kind_of(module: nn.Module) -> tuple[Any, ...] | None:
    """What layers must have in common to run together; None if the module cannot run with any."""
    if not isinstance(module, BLRLinear) or isinstance(module, ExpertsLinear) or module.device.type == "meta":
        return None
    record = structure_named(module.spec.structure)
    common = (type(module), module.spec.num_blocks, module.in_features, module.bias is None)
    form = module.storage.form
    if form is not None:
        if record.float8 and form == CodeForm(8, float8=True):
            # whatever their structures, they share the cast of their input
            return module.storage, module.in_features, module.device
        packs = record.grouped and record.packed and reads_packed(module.spec, form)
        return (*common, module.storage, module.dtype, module.device) if packs else None
    if not record.grouped:
        return None
    places = {(p.dtype, p.device) for p in module.parameters()}
    return (*common, *places) if len(places) == 1 else None


def run_together(modules: list[BLRLinear]) -> None:
    """Make a group of modules of one kind."""
    if modules[0].storage == PLAIN:
        pack([dict(module.named_parameters(recurse=False)) for module in modules])
        group = ProjectionGroup(modules)
    else:
        kinds = {(type(module), module.spec.num_blocks, module.bias is None) for module in modules}
        alike = len(kinds) == 1 and bool(structure_named(modules[0].spec.structure).grouped)
        if alike:
            held = [dict(zip(module.spec.names(), module.held(), strict=True)) for module in modules]
            for part in ("codes", "scale"):
                pack([{name: getattr(t, part) for name, t in of.items() if isinstance(t, InBits)} for of in held])
            pack([dict(module.named_parameters(recurse=False)) for module in modules])
        group = GroupInBits(modules, alike)
    for index, module in enumerate(modules):
        module.group = group, index


@torch.no_grad()
def pack(layers: Sequence[Mapping[str, Tensor]]) -> None:
    """Move factors side by side, in place: v and s along their ranks; the others where neighbours have one shape.

    Args:
        layers: {"u", ("s",) "v", ("bias"): tensor} of each layer, in the order in which they run.
    """
    for name in layers[0]:
        tensors = [layer[name] for layer in layers]
        if name in ("s", "v"):
            # s [B2, B1, R]; v [B1, rows, P], or low-rank's [rows, K]
            move_together(tensors, 2 if name == "s" else tensors[0].dim() - 2)
        else:
            for _, run in itertools.groupby(tensors, key=lambda t: t.shape):
                move_together(list(run), 0)


def move_together(tensors: list[Tensor], dim: int) -> None:
    """Give the tensors the parts of one buffer along `dim`, with the values they have."""
    if len(tensors) > 1:
        dtype = tensors[0].dtype
        # no release of PyTorch joins all of float8
        as_bytes = torch.uint8 if dtype.itemsize == 1 else dtype
        buffer = torch.cat([t.data.view(as_bytes) for t in tensors], dim).view(dtype)
        for tensor, part in zip(tensors, buffer.split([t.shape[dim] for t in tensors], dim), strict=True):
            tensor.data = part
