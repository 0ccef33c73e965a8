"""Arithmetic and traffic of every kernel form, stage by stage, and the time that a device's ceilings allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from hf_blr.ops.dispatch import FEW_TOKENS
from hf_blr.ops.triton.decode_launch import decodes, stacks
from hf_blr.ops.triton.launch import Device, fused_mix_config, fuses_mix, gemm_tiles, mixes_along_t, reads_swapped
from hf_blr.roofline.devices import Ceilings
from hf_blr.structures import BLRSpec

#: dense: one product. hf_blr: what the package launches on a GPU. pytorch: `ops.reference`. paper: PyTorch as arXiv
#: 2512.20861 counts it in its Table 2, where every permutation is a copy
FORMS = ("dense", "hf_blr", "pytorch", "paper")
#: for which the fused kernel's tiles are counted
HOPPER = Device((9, 0), 132, 232448)


@dataclass(frozen=True)
class Stage:
    """One kernel.

    Args:
        name: what it does.
        flops: operations, a multiply-add as two; padding is not counted.
        outside: bytes of x, weights and out, each once.
        between: bytes of the intermediates read and written, one entry each; they stay in L2 where they fit.
        repeated: bytes that pass from L2 because tiles read them again.
        product: many tokens on tensor cores, which take long to start and drain.
        few: our kernels for 2 to 32 tokens.
        tiles: of 128 x 128 outputs, in our kernels for many tokens.
        odd: a product of few tokens whose rows of outputs begin anywhere.
        scores: of attention, each with its exponential.
    """

    name: str
    flops: int
    outside: int
    between: tuple[int, ...] = ()
    repeated: int = 0
    product: bool = True
    few: bool = False
    tiles: int = 0
    odd: bool = False
    scores: int = 0

    @property
    def bytes(self) -> int:
        """Of everything read and written, each once."""
        return self.outside + sum(self.between)

    def memory_bytes(self, l2: float) -> int:
        """Bytes to and from memory: an intermediate of more than half of L2 does not stay there."""
        return self.outside + sum(b for b in self.between if b > l2 / 2)

    def bounds(self, device: Ceilings) -> dict[str, float]:
        """Seconds that each ceiling asks for."""
        bandwidth = (self.few and device.few_bandwidth) or (self.odd and device.odd_bandwidth) or device.bandwidth
        arithmetic = self.flops / device.flops + self.tiles * device.tile_seconds
        bounds = {"arithmetic": arithmetic, "memory": self.memory_bytes(device.l2) / bandwidth}
        if device.scores:
            bounds["scores"] = self.scores / device.scores
        if device.l2_bandwidth:
            bounds["L2"] = self.repeated / device.l2_bandwidth
        return bounds

    def seconds(self, device: Ceilings) -> float:
        """The largest bound, and what starting and draining the kernel costs."""
        start = device.product_seconds if self.product else device.kernel_seconds
        return max(self.bounds(device).values()) + start


def stages(
    spec: BLRSpec, tokens: int, form: str = "hf_blr", itemsize: int = 2, adds: bool = False, layers: int = 1
) -> list[Stage]:
    """The kernels of one forward.

    Args:
        spec: the layer's sizes; its factors do not matter for "dense".
        tokens: T.
        form: of `FORMS`.
        itemsize: bytes of a number.
        adds: whether the last stage adds a bias or activates, for which "hf_blr" cannot ask cuBLAS.
        layers: equal ones that run together, of which these are one's kernels: what is launched goes by all.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    kernels = (
        dense_stages(spec, tokens)
        if form == "dense"
        else blr_stages(spec, tokens, form, adds and form == "hf_blr", layers)
    )
    found = in_bytes(kernels, itemsize)
    if tokens > FEW_TOKENS:
        return found
    # few tokens leave even a product nothing but bytes to wait for
    few = form == "hf_blr" and tokens > 1
    return [replace(stage, product=False, few=few and stage.flops > 0) for stage in found]


def in_bytes(kernels: Iterable[Stage], itemsize: int) -> list[Stage]:
    """Stages counted in numbers, in bytes."""
    return [
        replace(
            stage,
            outside=stage.outside * itemsize,
            between=tuple(numbers * itemsize for numbers in stage.between),
            repeated=stage.repeated * itemsize,
        )
        for stage in kernels
    ]


def dense_stages(spec: BLRSpec, tokens: int) -> Iterator[Stage]:
    k, n = spec.in_features, spec.out_features
    odd = 1 < tokens <= FEW_TOKENS and n % 8 > 0
    yield Stage("x W^T", 2 * tokens * k * n, tokens * (k + n) + k * n, odd=odd)
    if tokens <= FEW_TOKENS:
        # cuBLAS gives parts of the sum to different multiprocessors, and adds them up in a kernel of its own
        yield Stage("sum of parts", 0, 0, (tokens * n,))


def blr_stages(spec: BLRSpec, tokens: int, form: str, adds: bool, layers: int) -> Iterator[Stage]:
    """In numbers instead of bytes."""
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    (b1, b2), (_, q) = spec.num_blocks, spec.block_shape
    shapes = spec.factor_shapes()
    u, v = size_of(shapes["u"]), size_of(shapes["c" if spec.structure == "pivoted" else "v"])
    s = size_of(shapes["s"]) if "s" in shapes else 0
    # y and z are of one size in Monarch, where every pair of blocks has its own rank
    y, z = (b1 * b2 * r * t,) * 2 if spec.structure == "monarch" else (b1 * r * t, b2 * r * t)
    project, expand, mix = 2 * t * v, 2 * t * u, 2 * t * s
    if spec.structure == "pivoted" and not (form == "hf_blr" and t == 1):
        rest = t * (k - r)
        # every feature of x is read and written once more, and the product adds to the pivots
        yield Stage("gather", 0, t * k + k, (y, rest), product=False)
        yield Stage("project", project, v, (y, rest, y))
        yield Stage("expand", expand, u + t * n, (z,))
        return
    if spec.structure == "pivoted":
        yield Stage("gather and project", project, t * k + v + k, (y,))
        yield Stage("expand", expand, u + t * n, (z,))
        return
    if form == "hf_blr" and decodes(t, b1, b2):
        if s and stacks(t, b1, layers * r, k // b1, HOPPER, mix=True):
            yield Stage("project", project, t * k + v, (y,))
            yield Stage("mix", mix, s, (y, z))
        else:
            yield Stage("project and mix" if s else "project", project + mix, t * k + v + s, (z,))
        yield Stage("expand", expand, u + t * n, (z,))
        return
    yield Stage("project", project, t * k + v, (y,))
    if form == "hf_blr" and s and fuses_mix(b1, b2, q, r, t):
        tile = fused_mix_config(b1, 2, HOPPER)
        columns, rows = b2 * -(-q // tile.bn), -(-t // tile.bt)
        again = columns * rows * r * (b1 * tile.bt + tile.bn)
        yield Stage(
            "mix and expand", expand + columns * 2 * b1 * t * r, s + u + t * n, (y,), again, tiles=columns * rows
        )
        return
    in_place = form == "hf_blr" and spec.structure == "monarch" and reads_swapped(b1, layers * b2, q, r, t, adds)
    if not in_place:
        yield from between_stages(spec, form, y, z, s, mix)
    yield Stage("expand", expand, u + t * n, (z,), tiles=gemm_tiles(t, q, b2) if in_place or adds else 0)
    if form == "pytorch" and spec.structure != "low_rank":
        yield Stage("order outputs", 0, 2 * t * n, product=False)


def between_stages(spec: BLRSpec, form: str, y: int, z: int, s: int, mix: int) -> Iterator[Stage]:
    """What happens to the first stage's result before the last reads it."""
    if spec.structure == "monarch":
        yield Stage("swap blocks", 0, 0, (y, z), product=False)
    if spec.structure == "blast":
        if form == "paper":
            yield Stage("permute y", 0, 0, (y, y), product=False)
        yield Stage("mix", mix, s, (y, z), product=form != "hf_blr" and mixes_along_t(*spec.num_blocks))
        if form == "paper":
            yield Stage("permute z", 0, 0, (z, z), product=False)


def size_of(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def predict(spec: BLRSpec, tokens: int, device: Ceilings, form: str = "hf_blr", itemsize: int = 2) -> float:
    """Seconds of one forward: stages run one after the other."""
    return sum(stage.seconds(device) for stage in stages(spec, tokens, form, itemsize))


def bound_of(kernels: list[Stage], device: Ceilings) -> str:
    """The ceiling that most of the time is spent at: "arithmetic", "memory", "L2" or "starts"."""
    spent: dict[str, float] = {}
    for stage in kernels:
        bounds = stage.bounds(device)
        name = max(bounds, key=bounds.get)
        spent[name] = spent.get(name, 0) + bounds[name]
        spent["starts"] = spent.get("starts", 0) + stage.seconds(device) - bounds[name]
    return max(spent, key=spent.get)


def break_even(spec: BLRSpec, device: Ceilings, form: str = "hf_blr", most: int = 65536) -> list[tuple[int, bool]]:
    """[(tokens, faster)]: from how many tokens on the layer is predicted faster than dense, and from how many not.

    Looked for at the powers of two up to `most`, and between two that differ by halving; the first entry is (1, ...).
    """

    def faster(tokens):
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
