"""The kernel that rounds columns one after the other, against the plain form."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from hf_blr.factorize import columns
from hf_blr.factorize.columns import plain_round_columns
from hf_blr.factorize.rounding import rounded_in_metric
from hf_blr.formats import format_named
from hf_blr.ops.triton import rounding
from hf_blr.ops.triton.rounding import nearest_code, nearest_scale, round_columns


def problem(*shape, size, seed=0):
    """Columns `[..., n, m]` in units of their scale, and an upper triangle for them."""
    generator = torch.Generator().manual_seed(seed)
    columns = size * torch.randn(*shape, generator=generator)
    upper = 0.3 * torch.randn(*shape[:-2], shape[-1], shape[-1], generator=generator).triu(1)
    return columns, upper + torch.eye(shape[-1])


def by_the_kernel(columns, upper, storage, scale=None):
    fractions = storage.fractions(columns.device)
    size = storage.group_size or columns.shape[-1]
    return round_columns(columns, upper, *storage.limits, storage.form.float8, size, fractions, scale)


FORMATS = [("int8", 50.0), ("int4", 3.0), ("int3", 1.5), ("int2", 1.0), ("fp8", 150.0)]


@pytest.mark.parametrize("name, size", FORMATS)
def test_it_rounds_as_the_plain_form_does(name, size):
    storage = format_named(name)
    # rows that no program's divide, columns that are no power of two, and a batch
    for shape in ((13, 32), (2, 3, 9, 19), (1, 1)):
        columns, upper = problem(*shape, size=size)
        scale = (0.5 + torch.rand(*shape[:-1], 1, generator=torch.Generator().manual_seed(1))).bfloat16()
        expected = plain_round_columns(columns, upper, storage, scale)
        for found, wanted in zip(by_the_kernel(columns, upper, storage, scale), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-4 * size)


@pytest.mark.parametrize("name, size", FORMATS)
def test_it_chooses_the_scales_of_groups(name, size):
    # one group, and several, of which later ones have seen the errors of those before; a group of zeros
    for groups, width in ((None, 24), (16, 48), (8, 8)):
        if groups and name == "fp8":
            continue
        storage = format_named(name, groups)
        columns, upper = problem(9, width, size=size)
        columns[5, : groups or width] = 0
        expected = plain_round_columns(columns, upper, storage)
        found = by_the_kernel(columns, upper, storage)
        assert torch.equal(found[2], expected.scale)
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0.0, atol=1e-4 * size)


def test_one_kernel_serves_blocks_of_all_widths(monkeypatch):
    """Compiling one takes longer than it runs, and ranks leave last blocks of any width."""
    widths = set()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, BM, **kw: widths.add(BM)

    monkeypatch.setattr(rounding, "round_columns_kernel", Kernel())
    storage = format_named("int8")
    for width in (1, 19, 64, 128):
        by_the_kernel(*problem(9, width, size=1.0), storage, torch.ones(9, 1))
    assert widths == {128}


def test_a_factor_is_rounded_through_it_as_in_plain_pytorch(monkeypatch):
    """All of it: blocks of rows and of columns, the last narrower, and scales of groups."""
    storage, found = format_named("int4", 48), []
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(*shape, generator=generator) for shape in ((9, 144), (200, 144), (40, 9)))
    for by_kernel in (True, False):
        monkeypatch.setattr(columns, "runs_kernel", lambda given, by_kernel=by_kernel: by_kernel)
        found.append(rounded_in_metric(weight, x.T @ x, storage, y.T @ y))
    assert torch.equal(found[0].values, found[1].values) and torch.equal(found[0].scale, found[1].scale)


def test_scales_are_the_nearest_in_bfloat16():
    x = torch.cat([torch.logspace(-37, 37, 2000), torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, 1e-45])])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)), value=1.0)
    found = torch.empty_like(x)
    scales_kernel[(1,)](x, found, len(x))
    assert torch.equal(found, x.bfloat16().clamp_min(torch.finfo(torch.bfloat16).tiny).float())


@triton.jit
def scales_kernel(x_ptr, out_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out_ptr + o, nearest_scale(tl.load(x_ptr + o)))


@triton.jit
def codes_kernel(x_ptr, out_ptr, lowest, highest, FLOAT8: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out_ptr + o, nearest_code(tl.load(x_ptr + o), lowest, highest, FLOAT8))


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8"])
def test_codes_are_those_of_the_format(name):
    storage = format_named(name)
    # all of float8's scales, the middles of integers, and far outside
    exponents = torch.logspace(-12, 10, 4000, base=2.0)
    middles = torch.arange(-150, 150) / 2
    x = torch.cat([exponents, -exponents, middles, torch.tensor([0.0])])
    x = torch.nn.functional.pad(x, (0, 16384 - len(x)))
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    between = (grid[1:] + grid[:-1]) / 2
    x[-len(between) :] = between
    found = torch.empty_like(x)
    codes_kernel[(1,)](x, found, *map(float, storage.limits), storage.form.float8, len(x))
    assert torch.equal(found, storage.clamped(x.clone()))
