"""Layers whose factors are kept in fp8, multiplied in float8: errors, bounds, and the choice of kernels."""

import importlib
from functools import partial

import pytest
import torch
from float8_cases import ONE_ROUNDING, ROUNDINGS, SIZES, exact, layer, patch_rounding, reference, relative
from tiny import tiny_llama, tiny_logits
from torch.utils.flop_counter import FlopCounterMode

import hf_blr
from hf_blr import ops
from hf_blr.formats import FORMATS, FactorInTraining
from hf_blr.inference import grouped
from hf_blr.linear import BLRLinear
from hf_blr.ops import bits
from hf_blr.ops.cast import LARGEST, cast_rows, plain_cast
from hf_blr.ops.rules import bits as rules
from hf_blr.ops.rules.bits import FLOAT8, NUMBERS, CodeForm, missing, route
from hf_blr.ops.rules.device import H100, Device
from hf_blr.ops.rules.float8 import Float8Config, float8_config, multiplies_by_cublas
from hf_blr.structures import Blast, LowRank, Monarch, structure_named

#: of the few of one token
OF_A_TOKEN = 0.032


def awkward_tokens(k, tokens=24):
    """Some like others, one with a massive activation, one of zeros, one tiny and one huge."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1))
    x[0, k // 3] = 1000
    x[1] = 0
    x[2] *= 1e-10
    x[3] *= 1e10
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cast_rounds_once_whatever_the_token(dtype):
    x = awkward_tokens(256).to(dtype)
    rows, scale = plain_cast(x)
    back = rows.double() * scale.double()[:, None]
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (24,) and torch.isfinite(back).all()
    assert not back[1].any()
    for token in (0, 2, 3, *range(4, 24)):
        assert relative(back[token], x[token].double()) < OF_A_TOKEN
    # the others beside a massive activation keep their digits
    small = x[0].double().abs() < 100
    assert relative(back[0][small], x[0][small].double()) < OF_A_TOKEN


def test_the_largest_token_is_the_largest_number():
    x = torch.zeros(3, 64)
    x[0, 5], x[1, 6], x[2] = 3e4, -1e-8, 7.0
    rows, _ = plain_cast(x)
    assert rows[0].float().max() == LARGEST and rows[1].float().min() == -LARGEST
    assert relative(rows.double().norm(dim=1), torch.full((3,), LARGEST).double()) < 0.04


@pytest.mark.parametrize("structure", SIZES)
def test_the_arithmetic_errs_by_one_rounding_of_each_intermediate(structure):
    module = layer(structure, 512, 64, bias=False)
    x = awkward_tokens(512, 64)
    out, wanted = reference(module, x), exact(module, x)
    allowed = ROUNDINGS[structure] ** 0.5 * ONE_ROUNDING
    assert allowed / 2 < relative(out[4:], wanted[4:]) < allowed
    for token in (2, 3):
        assert relative(out[token], wanted[token]) < 1.5 * allowed
    # a token that is one feature is rounded there alone, and the weights' column then
    assert relative(out[0], wanted[0]) < 1.5 * allowed
    assert not out[1].any()


def test_ranks_of_falling_norms_lose_nothing_that_counts():
    """Balanced factors of a matrix whose singular values fall over six decades."""
    module, x = layer("low_rank", 512, 64, bias=False), torch.randn(64, 512)
    fall = torch.logspace(0, -3, 32).bfloat16()
    module.v.weight_scale.data *= fall[:, None]
    numbers = module.u(torch.float32) * fall.float()
    module.u.take(module.storage.nearest(numbers))
    assert relative(reference(module, x), exact(module, x)) < 2**0.5 * ONE_ROUNDING


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")


@pytest.fixture
def rounding(monkeypatch, poisoned_buffers):
    pytest.importorskip("triton")
    patch_rounding(monkeypatch)


@pytest.fixture(autouse=True)
def float8_at_few_tokens(monkeypatch):
    """Small inputs take the kernels of many tokens too."""
    monkeypatch.setattr(rules, "reads_packed", lambda *args: False)


@interpreted
@pytest.mark.parametrize(
    "structure, dtype",
    [*((name, torch.float32) for name in SIZES), ("monarch", torch.float16), ("blast", torch.float16)],
)
def test_kernels_compute_that(rounding, structure, dtype):
    module = layer(structure, dtype=dtype)
    module.activation = "silu" if dtype == torch.float16 else ""
    x = awkward_tokens(128, 21).to(dtype) if dtype == torch.float32 else torch.randn(3, 7, 128).to(dtype)
    with torch.no_grad(), ops.use_impl("triton"):
        out = module(x)
    assert out.dtype == dtype
    finite = x.abs().amax(-1) < 1e9
    assert relative(out[finite], reference(module, x)[finite]) < 4e-3
    assert relative(out, exact(module, x)) < 1.3 * ROUNDINGS[structure] ** 0.5 * ONE_ROUNDING


@interpreted
@pytest.mark.parametrize("k", [128, 40])
def test_the_kernel_casts_as_plain_operations_do(rounding, k):
    x = awkward_tokens(k)
    rows, scale = torch.ops.hf_blr.cast_rows(x)
    wanted_rows, wanted_scale = plain_cast(x)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    # a number between two codes may go to either
    assert (rows.float() != wanted_rows.float()).sum() < 0.01 * x.numel() and not rows[1].float().any()
    assert relative(rows.float(), wanted_rows.double()) < 3e-3
    x[4, 1] = float("nan")
    assert torch.ops.hf_blr.cast_rows(x)[1][4].isnan()


@interpreted
@pytest.mark.parametrize("structure", SIZES)
def test_no_tokens(structure):
    pytest.importorskip("triton")
    with torch.no_grad(), ops.use_impl("triton"):
        assert layer(structure)(torch.empty(2, 0, 128)).shape == (2, 0, 64)


@interpreted
@pytest.mark.parametrize("structure", ["low_rank", "monarch", "blast", "pivoted"])
def test_nothing_overflows_where_the_bounds_are_met(rounding, structure):
    """Rows of largest codes, and tokens that lie along them."""
    module = layer(structure, bias=False)
    for name in {"v", "c"} & {*module.spec.names()}:
        getattr(module, name).weight.data.copy_(torch.full_like(getattr(module, name).weight.float(), LARGEST))
    if structure == "blast":
        torch.nn.init.ones_(module.s)
    with torch.no_grad(), ops.use_impl("triton"):
        for x in (torch.ones(3, 128), torch.full((3, 128), -1e-3)):
            assert relative(module(x), exact(module, x)) < 0.13


@interpreted
def test_nothing_overflows_where_rounding_makes_a_token_longer(rounding):
    # 448 / sqrt(688) is 17.08, which e4m3 rounds to 18
    module, x = layer("low_rank", 688, bias=False), torch.ones(2, 688)
    module.v.weight.data.copy_(torch.full((32, 688), LARGEST))
    assert plain_cast(x)[0].float().norm() > 1.05 * LARGEST * 2**0.5
    with torch.no_grad(), ops.use_impl("triton"):
        assert relative(module(x), exact(module, x)) < 0.13


@interpreted
@pytest.mark.parametrize("blocks", [(4, 16), (3, 2), (16, 16)], ids=str)
def test_blast_of_many_blocks(rounding, blocks):
    torch.manual_seed(0)
    b1, b2 = blocks
    spec = structure_named("blast").spec(16 * b1, 16 * b2, 32, blocks)
    module = BLRLinear.from_spec(spec, storage=FORMATS["fp8"], dtype=torch.float16).eval()
    x = torch.randn(9, spec.in_features).half()
    with torch.no_grad(), ops.use_impl("triton"):
        assert relative(module(x), reference(module, x)) < 6e-3


@interpreted
@pytest.mark.parametrize("structure", ["pivoted", "blast", "dense"])
def test_opcheck(structure):
    pytest.importorskip("triton")
    module = layer(structure)
    rows, scale = torch.ops.hf_blr.cast_rows(torch.randn(17, 128))
    held = [getattr(module, name) for name in module.spec.names()]
    parts = [part() if isinstance(part, torch.nn.Module) else part.detach() for part in held]
    tensors = [getattr(part, "codes", part) for part in parts]
    scales = [getattr(part, "scale", None) for part in parts]
    op = getattr(torch.ops.hf_blr, f"{structure}_float8")
    # PyTorch's check of schemas multiplies inputs, float8 too
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (rows, scale, tensors, scales, None, torch.float32, ""), test_utils=checks)
    if structure == "dense":
        torch.library.opcheck(torch.ops.hf_blr.cast_rows, (torch.randn(5, 40),), test_utils=checks)


@interpreted
def test_compiles_as_one_graph():
    pytest.importorskip("triton")
    module, x = layer("monarch"), torch.randn(2, 9, 128)
    with torch.no_grad(), ops.use_impl("triton"):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        # the kernel's stores drop bits under the interpreter, the cast of compiled code rounds
        assert relative(compiled(x), exact(module, x)) < 0.15


@interpreted
def test_each_number_of_a_group_meets_each_token():
    pytest.importorskip("triton")
    block = alike()
    hf_blr.fuse(block)
    with torch.no_grad(), ops.use_impl("triton"), FlopCounterMode(display=False) as mode:
        block.q_proj(torch.randn(9, 128).half())
    assert mode.get_total_flops() == sum(module.spec.flops(9) for module in block.children())


@interpreted
@pytest.mark.parametrize("structure", ["blast", "dense"])
def test_each_number_of_the_factors_meets_each_token(structure):
    pytest.importorskip("triton")
    module = layer(structure)
    with torch.no_grad(), ops.use_impl("triton"), FlopCounterMode(display=False) as mode:
        module(torch.randn(9, 128))
    assert mode.get_total_flops() == module.spec.flops(9)


def test_the_rule():
    spec, form = LowRank(4096, 4096, 1024), CodeForm(8, float8=True)
    assert route(spec, 4096, form, float8=True, packed=False) == FLOAT8
    assert route(spec, 4096, form, float8=False, packed=False) == NUMBERS
    assert route(spec, 4096, CodeForm(8), float8=True, packed=False) == NUMBERS
    # rows that tiles cannot be copied of
    assert route(LowRank(4096, 4096, 1023), 4096, form, float8=True, packed=False) == NUMBERS
    # so many small products that they are slower
    assert route(Monarch(4096, 4096, 64, (16, 16)), 4096, form, float8=True, packed=False) == NUMBERS
    # BLAST's are as many as its blocks, whatever the pairs; but weights of a mix fit registers
    for blocks, found in (((16, 16), FLOAT8), ((64, 4), FLOAT8), ((32, 32), NUMBERS), ((128, 2), NUMBERS)):
        assert route(Blast(4096, 4096, 992, blocks), 4096, form, float8=True, packed=False) == found
    assert missing(FLOAT8, (9, 0)) is None and missing(FLOAT8, (8, 9)) is None and missing(FLOAT8, None) is None
    assert "8.9" in missing(FLOAT8, (8, 6)) and missing(NUMBERS, (8, 6)) is None


def test_numbers_wherever_kernels_for_bits_cannot_run(monkeypatch):
    module, x = layer("low_rank"), torch.randn(5, 128)
    alone = ops.linear("low_rank", x, list(module.tensors(x.dtype).values()), module.bias, "reference")
    for impl in ("auto", "reference"):
        module.impl = impl
        assert module.route_in_bits(x) == NUMBERS and torch.equal(module(x), alone)
    module.impl = "triton"
    monkeypatch.setattr(bits, "missing", lambda found, _: missing(found, (8, 0)))
    monkeypatch.setattr(bits, "why_not_triton", lambda *_: None)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"low_rank in 8 bits: .* 8\.9, the GPU has 8\.0; use"):
        module(x)


@interpreted
def test_numbers_where_a_gradient_is_wanted():
    module, x = layer("blast").requires_grad_(False), torch.randn(5, 128)
    with ops.use_impl("triton"):
        assert module.route_in_bits(x) == FLOAT8
        assert module.route_in_bits(x.clone().requires_grad_()) == NUMBERS
        module.s.requires_grad_()
        assert module.route_in_bits(x) == NUMBERS
        with torch.no_grad():
            assert module.route_in_bits(x) == FLOAT8


@interpreted
def test_numbers_while_codes_or_scales_train():
    module, x = layer("low_rank"), torch.randn(5, 128)
    module.u = FactorInTraining(module.u, codes=False)
    with torch.no_grad(), ops.use_impl("triton"):
        assert module.route_in_bits(x) == NUMBERS
        assert relative(module(x), exact(module, x)) < 1e-5


@interpreted
def test_integers_become_numbers_at_many_tokens():
    module = BLRLinear.from_spec(LowRank(128, 64, 32), storage=FORMATS["int8"])
    with torch.no_grad(), ops.use_impl("triton"):
        assert module.route_in_bits(torch.randn(64, 128)) == NUMBERS


@interpreted
@pytest.mark.parametrize(
    "structure, config",
    [
        # tiles whose width is no power of two, of which the last is not full
        ("low_rank", Float8Config(16, 32, 32, 4, 1, beside=16)),
        ("monarch", Float8Config(32, 16, 16, 4, 1, beside=32)),
        # fewer programs than tiles, and more
        ("blast", Float8Config(16, 32, 16, 4, 1, stays=3)),
        ("pivoted", Float8Config(16, 16, 32, 4, 1, stays=3)),
        ("dense", Float8Config(16, 16, 32, 4, 1, beside=32, stays=99)),
    ],
    ids=str,
)
def test_every_kind_of_tile_computes_the_same(rounding, monkeypatch, structure, config):
    module, x = layer(structure, n=64 if structure == "dense" else 72), torch.randn(21, 128)
    with torch.no_grad(), ops.use_impl("triton"):
        wanted = module(x)
        monkeypatch.setattr("hf_blr.ops.triton.float8_gemm.float8_config", lambda *args: config)
        torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "dense"])
def test_the_last_stage_by_cublas(rounding, monkeypatch, structure):
    """PyTorch's product of float8 runs on a CPU too; its scales are what the first stage stores."""
    module, x = layer(structure, dtype=torch.bfloat16), torch.randn(21, 128).bfloat16()
    asked = []
    for name in ("float8_low_rank", "float8_dense"):
        kernels = importlib.import_module(f"hf_blr.ops.triton.{name}")
        monkeypatch.setattr(kernels, "multiplies_by_cublas", lambda *args: asked.append(args) or True)
    with torch.no_grad(), ops.use_impl("triton"):
        out = module(x)
    assert asked and relative(out, reference(module, x)) < 6e-3


def test_who_multiplies_the_last_stage():
    assert multiplies_by_cublas(4096, 4096, True, False, H100)
    # few tiles, another dtype, an activation, rows that cuBLAS does not take
    assert not multiplies_by_cublas(1024, 1024, True, False, H100)
    assert not multiplies_by_cublas(4096, 4096, False, False, H100)
    assert not multiplies_by_cublas(4096, 4096, True, True, H100)
    assert not multiplies_by_cublas(4096, 4104, True, False, H100)


def test_tiles_of_products():
    found = {
        (t, n, k, groups): (c.bt, c.outputs, c.warps)
        for t, n, k, groups in (
            (48, 4096, 4096, 1),
            (1024, 1024, 4096, 1),
            (1024, 1584, 4096, 1),
            # 128 tiles of 64 x 192 fill 132 SMs
            (1024, 1536, 14336, 1),
            (4096, 4096, 1024, 1),
            # 384 tiles of 128 x 128 leave a quarter of the card idle, 256 of 128 x 192 do not
            (4096, 1536, 4096, 1),
            (4096, 1584, 14336, 1),
            (4096, 14336, 1584, 1),
            (4096, 3168, 4096, 1),
            # of 256 columns, half of a second tile would be for nothing
            (4096, 384, 3584, 16),
        )
        for c in [float8_config(t, n, k, groups, H100)]
    }
    assert list(found.values()) == [
        (64, 128, 4),
        (64, 128, 4),
        (128, 128, 8),
        (64, 192, 4),
        (128, 128, 4),
        (128, 192, 8),
        (128, 256, 8),
        (128, 128, 4),
        (128, 128, 4),
        (128, 128, 4),
    ]
    # no wider than the outputs, and within the memory of smaller cards
    assert float8_config(4096, 64, 256, 16, H100).bn == 64
    small = float8_config(4096, 14336, 1584, 1, Device((8, 9), 128, 101376))
    assert small.stages * (small.bt + small.outputs) * small.bk <= 101376


def test_the_cast_of_compiled_code_is_plain():
    x = torch.randn(4, 32)
    rows, scale = torch.compile(cast_rows, fullgraph=True, backend="aot_eager")(x)
    wanted = plain_cast(x)
    assert torch.equal(rows.float(), wanted[0].float()) and torch.equal(scale, wanted[1])


@pytest.fixture
def casts(monkeypatch):
    """Each cast of an input to float8 is counted here."""
    found = []

    def counted(x):
        found.append(x)
        return cast_rows(x)

    for module in (bits, grouped):
        monkeypatch.setattr(module, "cast_rows", counted)
    return found


def attention():
    """q, k and v of one block, as `fuse` finds them."""
    block = torch.nn.Module()
    for name, structure in (("q_proj", "low_rank"), ("k_proj", "low_rank"), ("v_proj", "blast")):
        block.add_module(name, layer(structure))
    return block.eval()


@interpreted
def test_projections_with_one_input_cast_it_once(rounding, casts):
    block, x = attention(), torch.randn(1, 3, 128)
    with torch.no_grad(), ops.use_impl("triton"):
        alone = {name: module(x) for name, module in block.named_children()}
        assert len(casts) == 3
        assert hf_blr.fuse(block) == [("q_proj", "k_proj", "v_proj")]
        for name, module in block.named_children():
            assert torch.equal(module(x), alone[name])
        assert len(casts) == 4
        # a changed input is another one
        x *= 2
        block.q_proj(x)
        assert len(casts) == 5
    # a gradient is computed alone, by numbers
    assert block.q_proj(x.requires_grad_()).requires_grad and len(casts) == 5
    hf_blr.unfuse(block)
    assert block.q_proj.group is None


def alike(dtype=torch.float16):
    """q, k and v of low-rank layers, whose k and v are of one size, with their parent."""
    block = torch.nn.Module()
    for seed, (name, n, rank) in enumerate((("q_proj", 96, 48), ("k_proj", 64, 32), ("v_proj", 64, 32))):
        torch.manual_seed(seed)
        module = BLRLinear.from_spec(LowRank(128, n, rank), bias=True, dtype=dtype, storage=FORMATS["fp8"])
        torch.nn.init.normal_(module.bias)
        block.add_module(name, module)
    # the bound of the largest serves all: by powers of two more, which change no rounding
    for name, power in (("q_proj", -10), ("k_proj", -13), ("v_proj", -11)):
        block.get_submodule(name).v.weight_scale.data.fill_(2.0**power)
    return block.eval()


@interpreted
@pytest.mark.parametrize(
    "dtype, packed", [(torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str
)
def test_alike_layers_share_their_first_stage(rounding, monkeypatch, dtype, packed):
    block, x = alike(dtype), torch.randn(3, 7, 128).to(dtype)
    kernels = importlib.import_module("hf_blr.ops.triton.float8_low_rank")
    by_cublas, launched = [], []
    gemm, scaled_mm = kernels.float8_gemm, torch._scaled_mm
    monkeypatch.setattr(kernels, "multiplies_by_cublas", lambda tokens, n, *_: n == 96 and dtype == torch.bfloat16)
    monkeypatch.setattr(kernels, "float8_gemm", lambda *args, **kw: launched.append(args[2].shape) or gemm(*args, **kw))
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *args, **kw: by_cublas.append(kw["out"].shape) or scaled_mm(*args, **kw)
    )
    hf_blr.fuse(block)
    if not packed:
        for module in block.children():
            module.v.weight.data = module.v.weight.data.clone()
    with torch.no_grad(), ops.use_impl("triton"):
        assert block.q_proj(x[:, :0]).shape == (3, 0, 96)
        for module in block.children():
            assert relative(module(x), reference(module, x)) < (4e-3 if dtype == torch.float16 else 1e-2)
    first, last = [(1, 1, 21, 112)], [(2, 1, 21, 64)]
    if not packed:
        first, last = [(1, 1, 21, 48), (1, 1, 21, 32), (1, 1, 21, 32)], [(1, 1, 21, 64)] * 2
    assert sorted(launched) == sorted(first + last + ([] if dtype == torch.bfloat16 else [(1, 1, 21, 96)]))
    assert by_cublas == ([(21, 96)] if dtype == torch.bfloat16 else [])


@interpreted
def test_a_group_compiles_as_one_graph_with_one_cast(casts):
    pytest.importorskip("triton")
    block, x = attention(), torch.randn(7, 128)
    hf_blr.fuse(block)

    def forward(x):
        return block.q_proj(x) + block.k_proj(x) * block.v_proj(x)

    with torch.no_grad(), ops.use_impl("triton"):
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        assert relative(compiled(x), forward(x).double()) < 0.2
    # once while tracing, and once by the other
    assert len(casts) == 2


def test_groups_are_of_one_format_and_input():
    block = attention()
    block.v_proj = layer("low_rank", k=64)
    assert hf_blr.fuse(block) == [("q_proj", "k_proj")]
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(block, name, BLRLinear.from_spec(LowRank(64, 32, 16), storage=FORMATS["int3"]).eval())
    assert hf_blr.fuse(block) == []


def test_a_model_in_fp8_keeps_its_activations_fused():
    model = tiny_llama()
    hf_blr.compress(model, hf_blr.BLRConfig("low_rank", rank=16, factor_format="fp8"))
    expected = tiny_logits(model)
    groups = hf_blr.fuse(model)
    # gate and up share a cast at many tokens, and their last stage at one
    assert any(group[:2] == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj") for group in groups)
    assert torch.equal(tiny_logits(model), expected)


@interpreted
@pytest.mark.parametrize("structure", ["low_rank", "monarch", "blast"])
def test_rows_between_the_stages_begin_at_lines(rounding, monkeypatch, structure):
    strides = []
    kernels = importlib.import_module(f"hf_blr.ops.triton.float8_{structure}")
    run = kernels.float8_gemm

    def seen(a, b, c, *args, **kwargs):
        strides.extend(t.stride(-2) for t in (a, c) if t.shape[-1] <= 64 and t.dtype == torch.float8_e4m3fn)
        run(a, b, c, *args, **kwargs)

    monkeypatch.setattr(kernels, "float8_gemm", seen)
    with torch.no_grad(), ops.use_impl("triton"):
        layer(structure, k=512)(torch.randn(21, 512))
    assert len(strides) == 2 and {stride % 128 for stride in strides} == {0}


@interpreted
@pytest.mark.parametrize("structure", ["monarch", "blast"])
def test_factors_with_gaps_between_their_blocks(rounding, monkeypatch, structure):
    """As they lie where layers run together: read there, not copied."""
    module, x = layer(structure), torch.randn(21, 128)
    part = dict(module.named_children())["v"]
    codes, scale = part.weight, part.weight_scale
    with torch.no_grad():
        scale.mul_(torch.linspace(1, 9, scale.numel()).view_as(scale))
    kernels, read = importlib.import_module(f"hf_blr.ops.triton.float8_{structure}"), []

    def seen(run, *args, **kwargs):
        read.extend(t.data_ptr() for t in args if isinstance(t, torch.Tensor))
        return run(*args, **kwargs)

    for name in {"float8_gemm", "float8_mix"} & set(vars(kernels)):
        monkeypatch.setattr(kernels, name, partial(seen, getattr(kernels, name)))
    with torch.no_grad(), ops.use_impl("triton"):
        wanted = module(x)
        for name, t in (("weight", codes.clone()), ("weight_scale", scale.clone())):
            wide = t.new_zeros(t.shape[0], t.shape[1] + 16, t.shape[2])
            wide[:, : t.shape[1]] = t
            getattr(part, name).data = wide[:, : t.shape[1]]
        assert not part.weight_scale.is_contiguous()
        torch.testing.assert_close(module(x), wanted, rtol=0, atol=0)
    assert {part.weight.data_ptr(), part.weight_scale.data_ptr()} <= set(read)
