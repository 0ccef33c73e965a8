"""Peaks of devices, as data; `hf_blr.bench.peaks` measures those of the one at hand."""

from __future__ import annotations

from dataclasses import dataclass

from hf_blr.ops.rules.device import H100, Device


@dataclass(frozen=True)
class Peaks:
    """What bounds a kernel.

    Args:
        name: of the device.
        flops: floating-point operations a second of a 16-bit product summed in float32, without sparsity.
        bandwidth: bytes a second to and from memory.
        l2: bytes of cache that all multiprocessors share.
        l2_bandwidth: bytes a second out of it; None where it is not known, and then not a bound.
        few_bandwidth: bytes a second that our kernels for 2 to 32 tokens draw from memory: weights pass through shared
            memory into products of small tiles, which keep less of them on the way; None: `bandwidth`.
        scores: attention's scores a second, each with its exponential, where that and not the products is the limit.
        gathers: numbers a second that a kernel reads from wherever an index says, of any width; None where it is not
            known, and then not a bound.
        tile_seconds: what our kernels for many tokens take for each 128 x 128 outputs beyond the arithmetic, with all
            multiprocessors at work: tiles start, and are stored, while nothing is multiplied.
        float8_flops: operations a second of a product of float8; None where the device has none.
        odd_bandwidth: bytes a second that cuBLAS draws for few tokens where the outputs are no multiple of 8, so that
            their rows begin anywhere (GPT-2's 50257 words); None: `bandwidth`.
        chip: what the choice of kernels depends on.
        product_seconds: what a product of many tokens costs beyond the above: start, first loads, drain.
        kernel_seconds: the same of a decode kernel or an elementwise one, following another in a CUDA graph.
    """

    name: str
    flops: float
    bandwidth: float
    l2: float
    l2_bandwidth: float | None = None
    few_bandwidth: float | None = None
    scores: float | None = None
    odd_bandwidth: float | None = None
    gathers: float | None = None
    tile_seconds: float = 0.0
    product_seconds: float = 0.0
    kernel_seconds: float = 0.0
    float8_flops: float | None = None
    chip: Device = H100


#: as the makers state them, with nothing lost to starts and drains: a prediction from these is a floor.
#: Orin Nano: a quarter of its 40 sparse int8 TOPS, in its 15 W mode
DATASHEETS = {
    "A40": Peaks("A40", 149.7e12, 696e9, 6e6, chip=Device((8, 6), 84, 101376)),
    "Orin-Nano-8GB": Peaks("Orin-Nano-8GB", 10e12, 68e9, 2e6, chip=Device((8, 7), 8, 166912)),
    "RTX-4090": Peaks("RTX-4090", 165.2e12, 1008e9, 72e6, float8_flops=330.3e12, chip=Device((8, 9), 128, 101376)),
    "A100": Peaks("A100", 312e12, 2039e9, 40e6, chip=Device((8, 0), 108, 166912)),
    "H100": Peaks("H100", 989.4e12, 3350e9, 50e6, float8_flops=1978.9e12),
    "H200": Peaks("H200", 989.4e12, 4800e9, 50e6, float8_flops=1978.9e12),
}
#: a product of 8192^3 and a large copy on one H100, and the starts and drains of `docs/log.md`; L2's bandwidth
#: is what the fused last stage was seen to draw, that of few tokens what layers of 16 tokens do. Scores are those of
#: DiT's attention (heads of 72) at 16384 tokens and of Llama-3.2-1B's (of 64) at 8 x 1024, 1.28e12 both
MEASURED = {
    "H100-measured": Peaks(
        "H100-measured",
        flops=790e12,
        bandwidth=3.0e12,
        l2=50e6,
        l2_bandwidth=9.6e12,
        few_bandwidth=2.1e12,
        scores=1.28e12,
        tile_seconds=15e-9,
        odd_bandwidth=0.73e12,
        product_seconds=6e-6,
        kernel_seconds=1.5e-6,
    ),
    # a product of 8192^3, casts, and the layers of `results/layers_h200.json`: products of float8 at the rate of dense
    # layers, gathers at that of pivoted ones, starts as they fit best
    "H200-measured": Peaks(
        "H200-measured",
        flops=790e12,
        bandwidth=3.9e12,
        l2=60e6,
        l2_bandwidth=9.6e12,
        few_bandwidth=2.6e12,
        scores=1.28e12,
        tile_seconds=10e-9,
        odd_bandwidth=0.73e12,
        gathers=0.7e12,
        product_seconds=8e-6,
        kernel_seconds=1.5e-6,
        float8_flops=1430e12,
    ),
}
DEVICES = DATASHEETS | MEASURED
