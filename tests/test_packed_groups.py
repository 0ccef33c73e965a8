"""Layers in bits that share their input run together at few tokens, under Triton's interpreter on the CPU."""

import importlib

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from kernel_cases import recorded_grids  # noqa: E402

import hf_blr  # noqa: E402
from hf_blr import ops  # noqa: E402
from hf_blr.formats import format_named  # noqa: E402
from hf_blr.inference.fusion import run_together  # noqa: E402
from hf_blr.inference.grouped import GroupInBits  # noqa: E402
from hf_blr.linear import BLRLinear  # noqa: E402
from hf_blr.ops.triton import decode_one  # noqa: E402
from hf_blr.structures import Blast, LowRank, Monarch  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU")


def block_of(sizes, spec=lambda n: LowRank(32, n, 16), form="int4", group=16):
    """A module with q_proj, k_proj, ... of these many outputs."""
    torch.manual_seed(0)
    block = nn.Module()
    for name, n in zip(("q_proj", "k_proj", "v_proj"), sizes, strict=False):
        block.add_module(name, BLRLinear.from_spec(spec(n), storage=format_named(form, group), dtype=torch.float16))
    return block.eval()


def outputs(block, x):
    with torch.no_grad(), ops.use_impl("triton"):
        return [module(x) for module in block.children()]


@pytest.mark.parametrize(
    "spec, form, group",
    [
        (lambda n: LowRank(32, n, 16), "int4", 16),
        (lambda n: LowRank(32, n, 10 + n // 2), "int8", None),
        (lambda n: Monarch(32, n, 8, (2, 2)), "int8", None),
        (lambda n: Blast(32, n, 16, (2, 2)), "int4", None),
        (lambda n: Blast(32, n, 16, (2, 2)), "fp8", None),
    ],
    ids=["low_rank", "places", "monarch", "blast", "float8"],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_group_gives_what_its_layers_give_alone(spec, form, group, tokens, monkeypatch):
    block, x = block_of((24, 12, 12), spec, form, group), torch.randn(tokens, 32).half()
    expected, stored = outputs(block, x), {name: t.clone() for name, t in block.state_dict().items()}
    assert hf_blr.fuse(block) == [("q_proj", "k_proj", "v_proj")]
    calls, compute = [], GroupInBits.compute
    monkeypatch.setattr(GroupInBits, "compute", lambda self, x: calls.append(self) or compute(self, x))
    for out, wanted in zip(outputs(block, x), expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
    assert len(calls) == 1
    fused = block.state_dict()
    assert all(torch.equal(fused[name], t) for name, t in stored.items())
    # what a file holds shares no memory
    assert len({t.untyped_storage().data_ptr() for t in fused.values()}) == len(fused)
    hf_blr.unfuse(block)
    parameters = [p for p in block.parameters() if p.numel() > 1]
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


@pytest.mark.parametrize("ranks", [{24: 32, 12: 32}, {24: 48, 12: 32}], ids=["equal", "of two sizes"])
@pytest.mark.parametrize("tokens, kernel", [(1, "decode_one"), (3, "decode_places")])
def test_one_first_stage_for_all(tokens, kernel, ranks, monkeypatch):
    block, x = block_of((24, 12, 12), lambda n: LowRank(32, n, ranks[n]), group=None), torch.randn(tokens, 32).half()
    expected = outputs(block, x)
    hf_blr.fuse(block)
    grids = recorded_grids(monkeypatch, importlib.import_module(f"hf_blr.ops.triton.{kernel}"), f"{kernel}_kernel")
    for out, wanted in zip(outputs(block, x), expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
    # a last stage for q, and one for k and v, which are of one size
    assert len(grids) == 3


@pytest.mark.parametrize("form", ["int4", "plain"])
def test_a_last_stage_runs_beside_that_of_its_neighbours(form, monkeypatch):
    block = block_of((24, 12, 12), lambda n: LowRank(32, n, {24: 32, 12: 16}[n]), form, None)
    x = torch.randn(1, 32).half()
    hf_blr.fuse(block)
    beside, kernel = [], decode_one.decode_one_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: beside.append(kwargs["BESIDE"]) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(decode_one, "decode_one_kernel", Recorded())
    outputs(block, x)
    # the first stage of all, q's last stage, that of k and v
    assert beside == [False, False, True]


def test_more_layers_than_one_first_stage_has():
    torch.manual_seed(0)
    layers = [BLRLinear.from_spec(LowRank(32, 8, 16), storage=format_named("fp8"), dtype=torch.float16) for _ in "abcd"]
    x = torch.randn(2, 32).half()
    with torch.no_grad(), ops.use_impl("triton"):
        expected = [layer(x) for layer in layers]
        run_together(layers)
        outs = ops.grouped_in_bits("low_rank", x, [layer.held() for layer in layers], [layer.bias for layer in layers])
    for out, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("together", [True, False])
def test_gated_layers(together, group, tokens):
    block, x = block_of((24, 24), group=group), torch.randn(tokens, 32).half()
    gate, up = outputs(block, x)
    modules = list(block.children())
    if together:
        hf_blr.fuse(block)
    layers, biases = [module.held() for module in modules], [module.bias for module in modules]
    out = ops.gated_in_bits("low_rank", x, layers, biases, "silu")
    torch.testing.assert_close(out, nn.functional.silu(gate) * up, rtol=3e-3, atol=3e-3)
