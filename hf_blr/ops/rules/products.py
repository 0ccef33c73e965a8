"""Tiles of products at many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from hf_blr.ops.rules.device import INTERPRETER, Device, largest_power_of_two


@dataclass(frozen=True)
class GemmConfig:
    """Tiles over tokens, outputs and the contracted length, and compiler settings."""

    bt: int
    bn: int
    bk: int
    warps: int
    stages: int

    @property
    def outputs(self) -> int:
        """Of one tile."""
        return self.bn


Config = TypeVar("Config", bound=GemmConfig)

SMALLEST_GEMM = GemmConfig(16, 16, 16, 4, 1)


def gemm_config(chunk: int, tokens: int, itemsize: int, device: Device, activates: bool = False) -> GemmConfig:
    """For `block_gemm_kernel`; `chunk` is the length that is contiguous along the contraction."""
    if device == INTERPRETER:
        return SMALLEST_GEMM
    # two programs of 128 x 128 on a multiprocessor beat one of 128 x 256 by 7 % (20.3 and 22.2 us, 4 x
    # 1024^3, H100)
    bt = 128 if tokens > 64 else 64
    bk = min(128 // itemsize, max(16, largest_power_of_two(chunk)))
    # more warps share what an activation costs: 8192 x 304 x 3072 with a tanh 63.1 and 67.2 us, H100
    return fit_gemm(GemmConfig(bt, 128, bk, 8 if activates else 4, 3), itemsize, device)


def fused_mix_config(b1: int, itemsize: int, device: Device) -> GemmConfig:
    """For `blast_expand_kernel`, whose B1 + 1 tiles per step must leave room for a second program."""
    if device == INTERPRETER:
        return SMALLEST_GEMM
    config = GemmConfig(128, 128, 128 // itemsize, 4, 2)
    return fit_gemm(config, itemsize, device, tiles_a=b1)


def fit_gemm(config: Config, itemsize: int, device: Device, tiles_a: int = 1) -> Config:
    """The config with fewer stages, then a shorter step, then smaller tiles, until it fits."""

    def fits(c: GemmConfig) -> bool:
        return c.stages * (tiles_a * c.bt + c.outputs) * c.bk * itemsize <= device.shared_memory

    while not fits(config):
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.bk > 32:
            config = replace(config, bk=config.bk // 2)
        else:
            config = replace(config, bt=config.bt // 2)
    return config


def gemm_tiles(tokens: int, q: int, blocks: int) -> int:
    """Of 128 x 128 outputs, as many programs as `gemm_config` asks for at many tokens."""
    return blocks * -(-q // 128) * -(-tokens // 128)
