"""What becomes of a model's layers, with random factors: speed needs no others."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_blr.bench.models import Shape
from hf_blr.bench.rival_layers import rival_model
from hf_blr.bench.rivals import RIVALS
from hf_blr.bench.shapes import align_rank, typical_indices
from hf_blr.config import BLRConfig
from hf_blr.dense import feature_sizes, is_transposed
from hf_blr.formats import FORMATS, PLAIN, format_named
from hf_blr.inference.attention import use_attention
from hf_blr.inference.fusion import fuse
from hf_blr.integration import record_plan, swap_in
from hf_blr.plan import LayerPlan, Plan, resolve_plan
from hf_blr.structures import block_pair_of, structures
from hf_blr.targets import find_targets


@dataclass(frozen=True)
class Variant:
    """What a model's layers become: "dense", or a structure with the paper's ranks or with these blocks.

    Args:
        fused: what shares an input runs together (`hf_blr.fuse`); of a dense model only its attention is a fused one's.
        storage: the format in which factors are kept, or the matrices of a dense model.
        multiple: of ranks, where that costs little; see `align_rank`.
        by: whose kernels multiply a dense model's matrices in that format, of `rivals.RIVALS`; "": this package's.
    """

    structure: str
    paper: bool = False
    blocks: tuple[int, int] | None = None
    fused: bool = False
    storage: str = PLAIN.name
    by: str = ""
    multiple: int | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`dense`, `dense+attention`, `dense/fp8`, `low_rank+fused`, `blast:4x4/int4`, `monarch:paper`, of ranks that
        128 divides `low_rank@128/fp8`; of another library's kernels `dense/int4, gemlite`.

        Raises:
            ValueError: for anything else.
        """
        wanted, comma, by = text.partition(", ")
        if comma:
            storage = wanted.removeprefix("dense/")
            if by not in RIVALS.get(storage, {}):
                known = (f"dense/{name}, {library}" for name, makers in RIVALS.items() for library in makers)
                raise ValueError(f"expected one of {'; '.join(known)}, got {text!r}")
            return cls("dense", storage=storage, by=by)
        layers, plus, ending = text.partition("+")
        layers, slash, storage = layers.partition("/")
        layers, at, multiple = layers.partition("@")
        structure, _, detail = layers.partition(":")
        if at and (structure == "dense" or detail == "paper" or not multiple.isdecimal() or int(multiple) < 1):
            raise ValueError(f"expected a number after the @, of ranks that are ours to choose, got {text!r}")
        plain_dense = structure == "dense" and not slash
        if plus and ending != ("attention" if plain_dense else "fused"):
            raise ValueError(
                "expected nothing or +fused after a structure, its blocks and its format, or +attention after dense, "
                f"got {text!r}"
            )
        if slash and storage not in FORMATS:
            raise ValueError(f"expected one of {', '.join(FORMATS)} after the slash, got {text!r}")
        if structure == "dense" and not detail:
            return cls("dense", fused=bool(plus), storage=storage or PLAIN.name)
        if structure not in structures():
            raise ValueError(
                f"expected dense or one of {', '.join(structures())} (:paper or :B1xB2 after it), got {text!r}"
            )
        try:
            blocks = None if detail in ("", "paper") else block_pair_of(detail)
        except ValueError:
            raise ValueError(f"expected blocks such as 4x16 after the colon, got {text!r}") from None
        kept, cut = storage or PLAIN.name, int(multiple) if at else None
        return cls(structure, detail == "paper", blocks, bool(plus), kept, multiple=cut)

    @property
    def keeps_dense(self) -> bool:
        """Whether the model stays as it is built."""
        return self.structure == "dense" and self.storage == PLAIN.name

    def __str__(self) -> str:
        detail = "paper" if self.paper else "x".join(map(str, self.blocks)) if self.blocks else ""
        ending = "+attention" if self.keeps_dense else "+fused"
        kept = "" if self.storage == PLAIN.name else f"/{self.storage}"
        cut = "" if self.multiple is None else f"@{self.multiple}"
        return (
            f"{self.structure}:{detail}".rstrip(":") + cut + kept + ending * self.fused + (self.by and f", {self.by}")
        )


def build_model(
    shape: Shape, variant: Variant, ratio: float, device: str, dtype: torch.dtype, **options: Any
) -> nn.Module:
    """The model in evaluation mode, its weights random, on the device.

    Args:
        shape: what to build.
        variant: what its layers become. The factors are random too, nothing is fitted.
        ratio: kept / dense parameters of each replaced layer, where the paper's ranks are not asked for.
        device, dtype: of all parameters.
        **options: for `shape.build`.

    Raises:
        ValueError: if the paper's ranks are asked for and it has none, or no layers of a fused variant fit together.
    """
    with torch.device(device), default_dtype(dtype):
        model = shape.build(**options).eval()
        if shape.kind != "text":
            # the layout in which cuDNN's kernels read pictures; in the other they are copied first
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if variant.by:
            # attends as ours do
            use_attention(model)
            rival_model(model, variant.storage, variant.by)
            return model
        if variant.keeps_dense:
            if variant.fused and device != "meta" and not use_attention(model):
                raise ValueError(f"{type(model).__name__} does not attend by a function that can be replaced")
            return model
        plan = plan_for(model, shape, variant, ratio)
        for module in swap_in(model, plan).values():
            if module.device.type != "meta":
                # a fresh module's ascending order would make gathers cheaper than they are
                for name, index in typical_indices(module.spec, device).items():
                    module.indices()[name].copy_(index)
    if variant.fused and device != "meta" and not fuse(model):
        raise ValueError(f"no layers of {type(model).__name__} can run together as {variant.structure}")
    record_plan(model, config_for(variant, ratio), plan)
    return model


def config_for(variant: Variant, ratio: float) -> BLRConfig:
    if variant.structure == "dense":
        return BLRConfig("dense", dense_format=variant.storage)
    return BLRConfig(
        variant.structure,
        ratio=ratio,
        num_blocks=variant.blocks,
        factor_format=variant.storage,
        rank_multiple=variant.multiple,
    )


def plan_for(model: nn.Module, shape: Shape, variant: Variant, ratio: float) -> Plan:
    """{module: sizes}: the paper's layers and ranks, or the default targets at `ratio` with ranks the kernels like."""
    if not variant.paper:
        plan = resolve_plan(model, config_for(variant, ratio))
        # the rank of a whole matrix is not ours to choose
        if variant.structure == "dense":
            return plan
        return {name: replace(layer, spec=align_rank(layer.spec, variant.multiple)) for name, layer in plan.items()}
    storage = format_named(variant.storage)
    plan = paper_plan(model, shape, variant.structure)
    return {name: replace(layer, storage=storage) for name, layer in plan.items()}


def paper_plan(model: nn.Module, shape: Shape, structure: str) -> Plan:
    """The paper's layers at the paper's ranks.

    Raises:
        ValueError: if it has none for this model or structure, or they are not in this model in their sizes.
    """
    if not shape.paper:
        raise ValueError("the paper has no ranks for this model; leave :paper out")
    plan, found = {}, set()
    pattern = "|".join(f"({layer.modules})" for layer in shape.paper)
    for name in find_targets(model, rf"(.*\.)?({pattern})"):
        module = model.get_submodule(name)
        layer = next(x for x in shape.paper if re.fullmatch(rf"(.*\.)?({x.modules})", name))
        if feature_sizes(module) != (layer.in_features, layer.out_features):
            raise ValueError(f"{name} is {feature_sizes(module)}, the paper's {layer.name} is not")
        plan[name] = LayerPlan(layer.paper_spec(structure), module.bias is not None, is_transposed(module))
        found.add(layer)
    missing = [layer.name for layer in shape.paper if layer not in found]
    if missing:
        raise ValueError(f"this release of the model has no {', '.join(missing)} by the names known here")
    return plan


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
