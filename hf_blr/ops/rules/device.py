"""What a choice of kernels may depend on: the card's properties, and alignment."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What a launch choice may depend on."""

    capability: tuple[int, int]
    sms: int
    #: bytes that one program may have
    shared_memory: int

    @property
    def has_tma(self) -> bool:
        """Copies whole tiles by tensor descriptors."""
        return self.capability >= (9, 0)

    @property
    def has_pdl(self) -> bool:
        """Starts a kernel while the one before it ends (programmatic dependent launch)."""
        return self.capability >= (9, 0)

    @property
    def launch_options(self) -> dict[str, bool]:
        """Of a kernel that takes part in dependent launches; older cards know no such option."""
        return {"launch_pdl": True} if self.has_pdl else {}


#: where the interpreter runs: no Hopper features, and tiles as small as they come
INTERPRETER = Device((8, 0), 1, 0)
#: the card that the rules were measured on
H100 = Device((9, 0), 132, 232448)


def device_of(x: torch.Tensor) -> Device:
    return cuda_device(x.device.index) if x.is_cuda else INTERPRETER


@functools.cache
def cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def vector_width(*sizes: int) -> int:
    """The largest power of two up to 16 that divides every size.

    Triton sees alignment only in multiples of 16; sizes divided by this and multiplied back in the kernel
    show it the rest.
    """
    width = 16
    while any(size % width for size in sizes):
        width //= 2
    return width


def dot_precision(dtype: torch.dtype) -> str:
    """float32 inputs are multiplied in float32, as PyTorch does by default; the others have one way."""
    return "ieee" if dtype == torch.float32 else "tf32"


def pow2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def largest_power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n
