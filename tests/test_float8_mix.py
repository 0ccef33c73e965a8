"""BLAST's mix in float8: what it computes, within what rounding to float16 and float8 allows."""

import pytest
import torch
from float8_cases import FLOAT8, LONGER, ONE_ROUNDING, patch_rounding

from hf_blr.ops.rules.device import H100
from hf_blr.ops.rules.float8 import Float8MixConfig, float8_mix_config

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")


@pytest.fixture(autouse=True)
def rounding(monkeypatch, poisoned_buffers):
    patch_rounding(monkeypatch)


def case(b1, b2, tokens, rank, seed=0):
    """(y `[B1, T, R]` float8, s, scale of v)."""
    from hf_blr.ops.triton.float8_mix import blocks_in_lines

    random = torch.Generator().manual_seed(seed)
    y = blocks_in_lines(torch.empty(0, dtype=FLOAT8), b1, tokens, rank)
    y.copy_(torch.randn(b1, tokens, rank, generator=random).mul(20))
    s = torch.randn(b2, b1, rank, generator=random).bfloat16()
    return y, s, torch.rand(b1, rank, 1, generator=random).add(0.1).bfloat16()


def wanted(y, s, v_scale):
    """(z, peaks) in float64."""
    weights = s.double() * v_scale.double()[..., 0]
    peaks = LONGER * weights.square().sum(1).sqrt().amax(-1)
    return torch.einsum("ijr,jtr->itr", weights, y.double()) / peaks[:, None, None], peaks


def mixed(*tensors):
    from hf_blr.ops.triton.float8_mix import float8_mix

    z, peaks = float8_mix(*tensors)
    assert z.dtype == FLOAT8 and z.stride(1) % 128 == 0
    return z.double(), peaks


@pytest.mark.parametrize("sizes", [(4, 4, 21, 48), (3, 2, 40, 16), (2, 5, 1, 80), (16, 16, 3, 16)], ids=str)
def test_z_and_peaks(sizes):
    tensors = case(*sizes)
    z, peaks = mixed(*tensors)
    exact, expected = wanted(*tensors)
    size, _ = wanted(*(t.float().abs() for t in tensors))
    # half a step of float8, which has no smaller ones than 2^-9, and rounding of the sums and weights to float16
    assert ((z - exact).abs() <= 2**-4 * exact.abs() + 2**-10 + 2**-10 * size).all()
    torch.testing.assert_close(peaks.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        Float8MixConfig(1, 8, 16, 4, 1, 1),
        # rows of groups beyond the last output block, steps beyond the last token
        Float8MixConfig(4, 2, 32, 4, 3, 5),
        Float8MixConfig(2, 8, 64, 4, 2, 99),
    ],
    ids=str,
)
def test_every_kind_of_tile_computes_the_same(monkeypatch, config):
    tensors = case(4, 3, 21, 48)
    z, _ = mixed(*tensors)
    monkeypatch.setattr("hf_blr.ops.triton.float8_mix.float8_mix_config", lambda *args: config)
    assert torch.equal(mixed(*tensors)[0], z)


def test_ranks_of_small_weights_lose_what_float8_has_no_number_for():
    y, s, scale = case(4, 4, 32, 64)
    s *= torch.logspace(0, -6, 64).bfloat16()
    z, _ = mixed(y, s, scale)
    exact, _ = wanted(y, s, scale)
    # numbers below 2^-6 are rounded to steps of 2^-9
    for of in (slice(0, 16), slice(16, 64)):
        assert (z - exact)[..., of].norm() < (exact[..., of].abs().clamp_min(2**-6) * ONE_ROUNDING * 1.5).norm()


def test_an_output_block_of_zeros():
    y, s, scale = case(2, 3, 9, 32)
    s[1] = 0
    z, peaks = mixed(y, s, scale)
    assert not z[1].any() and peaks[1] > 0 and z[0].any() and z[2].any()


def test_weights_of_a_thread_fit_its_registers():
    for b1, b2 in ((1, 1), (4, 4), (3, 5), (6, 6), (4, 16), (16, 4), (16, 16), (2, 64), (64, 4), (12, 12)):
        config = float8_mix_config(b1, b2, H100)
        assert b1 * -(-b2 // config.groups) <= 64 and config.warps % config.groups == 0
        assert config.groups * config.bt * config.br == 4 * 32 * config.warps
        assert config.programs * config.warps * 32 <= 2048
