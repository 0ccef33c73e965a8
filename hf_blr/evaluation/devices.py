"""Ceilings of devices, as data; `hf_blr.bench.ceilings` measures those of the one at hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """What bounds a kernel.

    Args:
        name: of the device.
        flops: floating-point operations a second of a 16-bit product summed in float32, without sparsity.
        bandwidth: bytes a second to and from memory.
        l2: bytes of cache that all multiprocessors share.
        l2_bandwidth: bytes a second out of it; None where it is not known, and then not a bound.
        few_bandwidth: bytes a second that our kernels for 2 to 32 tokens draw from memory: weights pass through shared
            memory into products of small tiles, which keep less of them on the way; None: `bandwidth`.
        product_seconds: what a product of many tokens costs beyond the above: start, first loads, drain.
        kernel_seconds: the same of a decode kernel or an elementwise one, following another in a CUDA graph.
    """

    name: str
    flops: float
    bandwidth: float
    l2: float
    l2_bandwidth: float | None = None
    few_bandwidth: float | None = None
    product_seconds: float = 0.0
    kernel_seconds: float = 0.0


#: as the makers state them, with nothing lost to starts and drains: a prediction from these is a floor.
#: Orin Nano: a quarter of its 40 sparse int8 TOPS, in its 15 W mode
DATASHEETS = {
    "A40": Ceilings("A40", 149.7e12, 696e9, 6e6),
    "Orin-Nano-8GB": Ceilings("Orin-Nano-8GB", 10e12, 68e9, 2e6),
    "RTX-4090": Ceilings("RTX-4090", 165.2e12, 1008e9, 72e6),
    "A100": Ceilings("A100", 312e12, 2039e9, 40e6),
    "H100": Ceilings("H100", 989.4e12, 3350e9, 50e6),
    "H200": Ceilings("H200", 989.4e12, 4800e9, 50e6),
}
#: a product of 8192^3 and a large copy on one H100, and the starts and drains of `benchmarks/NOTES.md`; L2's bandwidth
#: is what the fused last stage was seen to draw, that of few tokens what layers of 16 tokens do
MEASURED = {"H100-measured": Ceilings("H100-measured", 790e12, 3.0e12, 50e6, 9.6e12, 2.1e12, 6e-6, 1.5e-6)}
DEVICES = DATASHEETS | MEASURED
