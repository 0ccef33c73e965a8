"""One kernel: its arithmetic, its traffic, and the time that a device's peaks allow for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hf_blr.roofline.devices import Peaks


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
        gathered: numbers that are read from wherever an index says.
        float8: a product of float8.
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
    gathered: int = 0
    float8: bool = False

    @property
    def bytes(self) -> int:
        """Of everything read and written, each once."""
        return self.outside + sum(self.between)

    def memory_bytes(self, l2: float) -> int:
        """Bytes to and from memory: an intermediate of more than half of L2 does not stay there."""
        return self.outside + sum(b for b in self.between if b > l2 / 2)

    def times(self, count: float) -> Stage:
        """One kernel that does the work of so many."""
        return replace(
            self,
            flops=round(count * self.flops),
            outside=round(count * self.outside),
            between=tuple(round(count * size) for size in self.between),
            repeated=round(count * self.repeated),
            tiles=round(count * self.tiles),
            scores=round(count * self.scores),
            gathered=round(count * self.gathered),
        )

    def bounds(self, device: Peaks) -> dict[str, float]:
        """Seconds that each peak asks for. Raises ValueError for float8 on a device without it."""
        rate = device.float8_flops if self.float8 else device.flops
        if rate is None:
            raise ValueError(f"{device.name} multiplies no float8; take a device of compute capability 8.9 or above")
        bandwidth = (self.few and device.few_bandwidth) or (self.odd and device.odd_bandwidth) or device.bandwidth
        arithmetic = self.flops / rate + self.tiles * device.tile_seconds
        bounds = {"arithmetic": arithmetic, "memory": self.memory_bytes(device.l2) / bandwidth}
        if device.scores:
            bounds["scores"] = self.scores / device.scores
        if device.gathers:
            bounds["gathers"] = self.gathered / device.gathers
        if device.l2_bandwidth:
            bounds["L2"] = self.repeated / device.l2_bandwidth
        return bounds

    def seconds(self, device: Peaks) -> float:
        """The largest bound, and what starting and draining the kernel costs."""
        start = device.product_seconds if self.product else device.kernel_seconds
        return max(self.bounds(device).values()) + start


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
