"""How each kernel is launched: pure functions of sizes, dtype and device properties, so that tests can call them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Device:
    """What a launch choice may depend on."""

    capability: tuple[int, int]
    sms: int
    shared_memory: int

    @property
    def has_tma(self) -> bool:
        """Hopper's tensor-copy engine."""
        return self.capability >= (9, 0)

    @property
    def has_pdl(self) -> bool:
        """Hopper's dependent launches: a kernel's start overlaps the end of the one before."""
        return self.capability >= (9, 0)


#: where the interpreter runs: the oldest features, so that what it tests is what every card can run
INTERPRETER = Device((8, 0), 1, 1 << 30)


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and compiler settings of `block_gemm_kernel`."""

    bt: int
    bn: int
    bk: int
    warps: int
    stages: int


def device_of(x: torch.Tensor) -> Device:
    return _cuda_device(x.device.index) if x.is_cuda else INTERPRETER


@functools.cache
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


def vector_width(*sizes: int) -> int:
    """The largest power of two up to 16 that divides every size.

    Triton sees alignment only in multiples of 16; sizes divided by this and multiplied back in the kernel show it the rest.
    """
    width = 16
    while any(size % width for size in sizes):
        width //= 2
    return width


def dot_precision(dtype: torch.dtype) -> str:
    """float32 inputs are multiplied in float32, as PyTorch does by default; others have one way."""
    return "ieee" if dtype == torch.float32 else "tf32"


def pow2(n: int) -> int:
    return triton.next_power_of_2(n)


@dataclass(frozen=True)
class MixConfig:
    """Tile sizes of `blast_mix_kernel`."""

    bt: int
    br: int
    dot: bool
    warps: int


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of one decode kernel: rows of weights per program, and the length read at a time."""

    rows: int
    length: int
    warps: int
    stages: int


def pdl_option(device: Device) -> dict:
    """The launch keyword for kernels that begin before the previous one has ended; absent where there is no such thing."""
    return {"launch_pdl": True} if device.has_pdl else {}


@dataclass(frozen=True)
class PersistentConfig:
    """Tile sizes of `two_stage_kernel`, and how many of its programs share a multiprocessor."""

    bt: int
    br: int
    bq: int
    bk: int
    bs: int
    warps: int
    stages: int
    per_sm: int
    prefetch: bool = False
