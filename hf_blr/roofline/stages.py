"""The kernels of a forward, stage by stage, and the time that a device's peaks allow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from hf_blr.formats import PLAIN, Format
from hf_blr.ops.rules.bits import FLOAT8, PACKED, route
from hf_blr.ops.rules.device import H100, Device
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.ops.rules.packed import reads_packed
from hf_blr.roofline.devices import Peaks
from hf_blr.roofline.stage import Stage, in_bytes
from hf_blr.structures import BLRSpec, structure_named

#: dense: one product. hf_blr: what the package launches on a GPU. pytorch: the structure's plain form. paper: PyTorch
#: as arXiv 2512.20861 counts it in its Table 2, where every permutation is a copy. float8: what the package launches at
#: many tokens for factors in fp8, the cast of x included
FORMS = ("dense", "hf_blr", "pytorch", "paper", "float8")


def stages(
    spec: BLRSpec,
    tokens: int,
    form: str = "hf_blr",
    itemsize: int = 2,
    adds: bool = False,
    layers: int = 1,
    chip: Device = H100,
    storage: Format = PLAIN,
) -> list[Stage]:
    """The kernels of one forward.

    Args:
        spec: the layer's sizes; its factors do not matter for "dense".
        tokens: T.
        form: of `FORMS`; a structure without kernels runs in the form "pytorch" where "hf_blr" is asked for.
        itemsize: bytes of a number; of x and the outputs where factors are float8.
        adds: whether the last stage adds a bias or activates, for which "hf_blr" cannot ask cuBLAS.
        layers: equal ones that run together, of which these are one's kernels: what is launched goes by all.
        chip: the card whose kernels are counted.
        storage: the format in which factors are kept, of up to 32 tokens: kernels of "hf_blr" read them packed.

    Raises:
        ValueError: for an unknown form; for a format that no kernel reads packed at so many tokens.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    record = structure_named(spec.structure)
    if form == "hf_blr" and not (record.kernels or (record.packed and storage.form is not None)):
        form = "pytorch"
    if form == "float8":
        return list(float8_stages(spec, tokens, itemsize, layers, chip))
    if form == "dense":
        found = in_bytes(dense_stages(spec, tokens), itemsize)
    else:
        counted = record.load("stages")(spec, tokens, form, adds and form == "hf_blr", layers, chip)
        found = in_bytes(counted, itemsize)
    if storage.form is not None:
        found = packed(found, spec, tokens, form, itemsize, storage)
    if tokens > FEW_TOKENS:
        return found
    # few tokens leave even a product nothing but bytes to wait for
    few = form == "hf_blr" and tokens > 1
    return [replace(stage, product=False, few=few and stage.flops > 0) for stage in found]


def packed(kernels: list[Stage], spec: BLRSpec, tokens: int, form: str, itemsize: int, storage: Format) -> list[Stage]:
    """The kernels with factors in the format's bytes, of which each product reads as many as it multiplies by."""
    record = structure_named(spec.structure)
    numbers = sum(math.prod(shape) for shape in storage.in_bits(spec).values())
    scaled = storage.form is not None and reads_packed(spec, storage.form)
    if tokens > FEW_TOKENS or form != "hf_blr" or not (record.packed and scaled):
        raise ValueError(
            f"no kernel reads {spec.structure} factors packed in {storage.name} at {tokens} tokens, form {form!r}; "
            "count them as plain"
        )
    # what is kept as numbers is the same in both
    saved = PLAIN.num_bytes(spec, torch.bfloat16) - storage.num_bytes(spec, torch.bfloat16) + numbers * (itemsize - 2)
    flops = sum(stage.flops for stage in kernels)
    return [replace(stage, outside=stage.outside - saved * stage.flops // flops) for stage in kernels]


def float8_stages(spec: BLRSpec, tokens: int, itemsize: int, layers: int, chip: Device) -> Iterator[Stage]:
    """In bytes: the structure's stages on numbers of one byte, behind a cast; outputs are of itemsize."""
    x, out = tokens * spec.in_features, tokens * spec.out_features
    yield Stage("cast", 0, x * itemsize, (x,), product=False)
    first, *others = structure_named(spec.structure).load("stages")(spec, tokens, "float8", False, layers, chip)
    # what the cast has just written
    kernels = [replace(first, outside=first.outside - x, between=(x, *first.between)), *others]
    kernels[-1] = replace(kernels[-1], outside=kernels[-1].outside + (itemsize - 1) * out)
    for stage in kernels:
        yield replace(stage, float8=stage.product)


def dense_stages(spec: BLRSpec, tokens: int) -> Iterator[Stage]:
    k, n = spec.in_features, spec.out_features
    odd = 1 < tokens <= FEW_TOKENS and n % 8 > 0
    yield Stage("x W^T", 2 * tokens * k * n, tokens * (k + n) + k * n, odd=odd)
    if tokens <= FEW_TOKENS:
        # cuBLAS gives parts of the sum to different multiprocessors, and adds them up in a kernel of its own
        yield Stage("sum of parts", 0, 0, (tokens * n,))


def predict(
    spec: BLRSpec, tokens: int, device: Peaks, form: str = "hf_blr", itemsize: int = 2, storage: Format = PLAIN
) -> float:
    """Seconds of one forward: stages run one after the other."""
    kernels = stages(spec, tokens, form, itemsize, chip=device.chip, storage=storage)
    return sum(stage.seconds(device) for stage in kernels)


def stored_stages(spec: BLRSpec, storage: Format, tokens: int, device: Peaks, alone: bool = True) -> list[Stage]:
    """The kernels of one forward of a layer in 16 bits whose factors are kept in this format.

    What runs is what `ops.rules.bits.route` says: up to 32 tokens kernels that read the factors as they are stored,
    beyond them products of float8 where the device has them. Else the factors become numbers first, in a pass that
    reads what is stored and writes numbers.

    Args:
        alone: whether a layer by itself runs; experts of a tensor have no products of float8.
    """
    if storage.form is None:
        return stages(spec, tokens, chip=device.chip)
    record = structure_named(spec.structure)
    float8 = bool(record.float8) and alone and device.float8_flops is not None
    found = route(spec, tokens, storage.form, float8, bool(record.packed))
    if found == PACKED:
        return stages(spec, tokens, chip=device.chip, storage=storage)
    if found == FLOAT8:
        return stages(spec, tokens, "float8", chip=device.chip)
    stored, numbers = storage.num_bytes(spec, torch.bfloat16), PLAIN.num_bytes(spec, torch.bfloat16)
    unpacking = Stage("numbers of codes", 0, stored + numbers, product=False)
    return [unpacking, *stages(spec, tokens, chip=device.chip)]


def predict_stored(spec: BLRSpec, storage: Format, tokens: int, device: Peaks) -> float:
    """Seconds of one forward by the kernels of `stored_stages`."""
    return sum(stage.seconds(device) for stage in stored_stages(spec, storage, tokens, device))


def bound_of(kernels: list[Stage], device: Peaks) -> str:
    """The peak that most of the time is spent at: "arithmetic", "memory", "L2" or "starts"."""
    spent: dict[str, float] = {}
    for stage in kernels:
        bounds = stage.bounds(device)
        name = max(bounds, key=bounds.__getitem__)
        spent[name] = spent.get(name, 0) + bounds[name]
        spent["starts"] = spent.get("starts", 0) + stage.seconds(device) - bounds[name]
    return max(spent, key=spent.__getitem__)


def break_even(spec: BLRSpec, device: Peaks, form: str = "hf_blr", most: int = 65536) -> list[tuple[int, bool]]:
    """[(tokens, faster)]: from how many tokens on the layer is predicted faster than dense, and from how many not.

    Looked for at the powers of two up to `most`, and between two that differ by halving; the first entry is (1, ...).
    """

    def faster(tokens: int) -> bool:
        return predict(spec, tokens, device, form) < predict(spec, tokens, device, "dense")

    changes, low = [(1, faster(1))], 1
    while low < most:
        high = low * 2
        if faster(high) != changes[-1][1]:
            before, after = low, high
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (before, middle) if faster(middle) != changes[-1][1] else (middle, after)
            changes.append((after, not changes[-1][1]))
        low = high
    return changes
