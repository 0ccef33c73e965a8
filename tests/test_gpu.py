"""The kernels at real sizes on a GPU, in bfloat16 and the other dtypes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from expert_cases import STRUCTURES, make_experts, make_tokens
from float8_cases import ONE_ROUNDING, ROUNDINGS, exact, relative
from kernel_cases import (
    FUNCTIONS,
    GROUPED,
    assert_gated_within_budget,
    assert_grouped_within_budget,
    assert_packed_within_budget,
    assert_within_budget,
    attention_inputs,
    layer_in_bits,
    make_inputs,
    make_layers,
)
from tiny import tiny_inputs, tiny_llama, tiny_tokenizer

import hf_blr
from hf_blr import ops
from hf_blr.bench.timing import Timer
from hf_blr.calibration.precision import calibrating
from hf_blr.factorize import factorize
from hf_blr.factorize.columns import plain_round_columns, round_columns, runs_kernel
from hf_blr.factorize.rounding import rounded_in_metric
from hf_blr.formats import FactorInBits, format_named
from hf_blr.inference import compile_kernels
from hf_blr.inference.fusion import run_together
from hf_blr.inference.grouped import ProjectionGroup
from hf_blr.linear import BLRLinear
from hf_blr.ops.activations import ACTIVATIONS
from hf_blr.structures import LowRank, structure_named
from hf_blr.text import write_windows, written

pytest.importorskip("triton")
from hf_blr.ops.attention import one_query_attention  # noqa: E402
from hf_blr.ops.rules.bits import FLOAT8, LEAST_FLOAT8, PACKED  # noqa: E402
from hf_blr.ops.rules.few_tokens import DecodeConfig  # noqa: E402
from hf_blr.ops.triton import decode_expand  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# B1, B2, P, Q, R
SIZES = [
    (4, 4, 256, 256, 256),
    (4, 16, 256, 64, 1016),
    (16, 16, 43, 48, 96),
    (6, 6, 128, 384, 191),
    (3, 5, 36, 48, 7),
    (16, 4, 64, 128, 128),
    (1, 1, 512, 384, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 300])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_kernels_keep_the_error_budget(structure, tokens, size):
    assert_within_budget(structure, make_inputs(structure, tokens, *size, torch.bfloat16, "cuda"))


# without a bias: Monarch's last stage in place (the first two, at many tokens) or after a copy, first stages as stacks
@pytest.mark.parametrize(
    "size",
    [(4, 4, 256, 512, 256), (16, 16, 64, 128, 48), (4, 4, 128, 2048, 96), (4, 4, 2752, 128, 288), (2, 3, 96, 64, 20)],
    ids=str,
)
@pytest.mark.parametrize("tokens", [2, 20, 32, 300, 1100])
@pytest.mark.parametrize("structure", ["monarch", "blast"])
def test_without_a_bias(structure, tokens, size):
    assert_within_budget(structure, make_inputs(structure, tokens, *size, torch.bfloat16, "cuda", bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 130])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_other_dtypes_keep_the_error_budget(structure, tokens, dtype):
    assert_within_budget(structure, make_inputs(structure, tokens, 4, 8, 64, 48, 72, dtype, "cuda", bias=False))


@pytest.mark.parametrize("size", [SIZES[0], SIZES[1], SIZES[4], SIZES[6]], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33, 600])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_activations_in_the_last_stage(structure, tokens, size):
    x, *tensors = (t.detach() for t in make_inputs(structure, tokens, *size, torch.bfloat16, "cuda"))
    kernel, eager = FUNCTIONS[structure]
    with torch.no_grad():
        exact = eager(x.double(), *(t.double() if t.is_floating_point() else t for t in tensors))
        for name, function in ACTIVATIONS.items():
            out, cheap, truth = kernel(x, *tensors, activation=name), function(eager(x, *tensors)), function(exact)
            allowed = 2 * (cheap - truth).norm() + torch.finfo(x.dtype).eps * truth.norm()
            assert (out - truth).norm() <= allowed, name


@pytest.mark.parametrize("sizes", [[(256, 1024)] * 2, [(344, 352)] * 2, [(9, 32)] * 2], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("structure", GROUPED)
def test_gated_layers_keep_the_error_budget(structure, tokens, sizes):
    for packed in (True, False):
        settings = {"b1": 4, "b2": 4, "p": 256, "dtype": torch.bfloat16, "device": "cuda", "packed": packed}
        assert_gated_within_budget(structure, tokens, sizes, **settings)


@pytest.mark.parametrize(
    "config", [DecodeConfig(8, 64, 4, 3, programs=2, ahead=2), DecodeConfig(16, 32, 8, 4, programs=1)]
)
@pytest.mark.parametrize("tokens", [2, 16, 31])
@pytest.mark.parametrize("structure", GROUPED)
def test_programs_that_loop_keep_the_error_budget(structure, tokens, config, monkeypatch):
    monkeypatch.setattr(decode_expand, "expand_config", lambda *sizes: config)
    # more tiles than programs, ranks that are and are not loaded in pieces of 16 bytes
    for rank in (96, 91):
        assert_within_budget(structure, make_inputs(structure, tokens, 4, 4, 64, 4500, rank, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("size", [(4, 4, 256, 192, 128), (2, 3, 240, 100, 96), (16, 16, 48, 96, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 32])
@pytest.mark.parametrize("structure", [*FUNCTIONS, "dense"])
def test_layers_in_bits_keep_the_error_budget(structure, tokens, size):
    large = math.gcd(*size[2::2])
    forms = (("int4", 16), ("int4", None), ("int8", large), ("fp8", None))
    for form, group in (*forms, ("int4", 128)) if size[0] == 4 else forms:
        settings = {"bias": group is None, "activation": "gelu" if form == "fp8" else ""}
        assert_packed_within_budget(structure, form, group, tokens, size, torch.bfloat16, "cuda", **settings)


@pytest.mark.parametrize("form, group", [("int4", 128), ("int4", None), ("int8", 64), ("fp8", None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_layers_in_bits_on_one_input_multiply_place_by_place(form, group, dtype, tokens):
    # q, k and v, of two sizes; gate and up
    for sizes in (((384, 256), (96, 128), (96, 128)), ((640, 384), (640, 384))):
        torch.manual_seed(0)
        layers = [
            BLRLinear.from_spec(
                LowRank(1024, n, r), storage=format_named(form, group), dtype=dtype, device="cuda"
            ).eval()
            for n, r in sizes
        ]
        x = torch.randn(tokens, 1024, device="cuda", dtype=dtype)
        exact = [F.linear(x.double(), layer.dense_weight(torch.float64), layer.bias.double()) for layer in layers]
        run_together(layers)
        held, biases = [layer.held() for layer in layers], [layer.bias for layer in layers]
        for out, wanted in zip(ops.grouped_in_bits("low_rank", x, held, biases), exact, strict=True):
            assert (out - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
        if len(sizes) == 2:
            out, wanted = ops.gated_in_bits("low_rank", x, held, biases, "silu"), F.silu(exact[0]) * exact[1]
            assert (out - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30], ids=str)
def test_layers_in_bits_on_one_input_of_any_size(form, size):
    torch.manual_seed(0)
    # rows of three steps and a short one
    layer = BLRLinear.from_spec(
        LowRank(1600, 384, 400), bias=False, storage=format_named(form), dtype=torch.bfloat16, device="cuda"
    ).eval()
    x = torch.randn(1, 1600, device="cuda") * size
    # most models have features like these
    x[:, 7] *= 1000
    x = x.to(torch.bfloat16)
    wanted = F.linear(x.double(), layer.dense_weight(torch.float64))
    with torch.no_grad(), ops.use_impl("triton"):
        out = layer(x)
    assert (out - wanted).norm() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.norm()


@pytest.mark.parametrize("form, group, bits", [("int4", 20, 4), ("int8", None, 8), ("fp8", None, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_in_one_pass(form, group, bits, dtype):
    held, _ = layer_in_bits("dense", form, group, (1, 1, 740, 333, 1), dtype, "cuda")
    module = FactorInBits(format_named(form, group), (333, 740), "cuda")
    getattr(module, module.storage.code_part).data.copy_(held[0].codes)
    module.weight_scale.data.copy_(held[0].scale)
    exact = module.storage.codes(module.parts(), module.shape).numbers(dtype)
    assert torch.equal(module(dtype), exact) and torch.equal(ops.numbers_in_bits(held[0], dtype), exact)


@pytest.mark.parametrize("form, group", [("int4", 32), ("fp8", None)])
@pytest.mark.parametrize("structure", [*FUNCTIONS, "dense"])
def test_a_layer_in_bits_compiles_and_runs_in_a_cuda_graph(structure, form, group):
    held, _ = layer_in_bits(structure, form, group, (4, 4, 128, 96, 64), torch.bfloat16, "cuda")
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)

    def function(x):
        return ops.linear_in_bits(PACKED, structure, x, held)

    expected = function(x)
    assert torch.equal(torch.compile(function, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = function(x)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("batch, heads, length, d", [(1, 8, 192, 128), (3, 2, 1000, 64), (1, 2, 4096, 80)])
def test_attention_of_one_query(batch, heads, length, d, groups):
    q, k, v, mask = attention_inputs(batch, heads, groups, length, d, torch.bfloat16, "cuda")
    exact = one_query_attention(q.double(), k.double(), v.double(), mask, impl="reference")
    cheap = one_query_attention(q, k, v, mask, impl="reference")
    for _ in range(3):
        out = one_query_attention(q, k, v, mask, impl="triton")
        allowed = 2 * (cheap - exact).norm() + torch.finfo(q.dtype).eps * exact.norm()
        assert (out - exact).norm() <= allowed


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_real_layer(structure):
    rank = 1024 if structure != "monarch" else 256
    assert_within_budget(structure, make_inputs(structure, 1024, 4, 4, 1024, 1024, rank, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("structure", FUNCTIONS)
@pytest.mark.parametrize("tokens", [1, 200])
def test_results_repeat_bit_for_bit(structure, tokens):
    tensors = make_inputs(structure, tokens, 4, 16, 128, 64, 256, torch.bfloat16, "cuda")
    runs = [FUNCTIONS[structure][0](*tensors, impl="triton") for _ in range(3)]
    assert all(torch.equal(runs[0], r) for r in runs[1:])


@pytest.mark.parametrize("structure", FUNCTIONS)
@pytest.mark.parametrize("tokens", [1, 200])
def test_runs_in_a_cuda_graph(structure, tokens):
    tensors = [t.detach() for t in make_inputs(structure, tokens, 4, 16, 128, 64, 256, torch.bfloat16, "cuda")]
    function = FUNCTIONS[structure][0]
    expected = function(*tensors)
    stream = torch.cuda.Stream()
    # on a busy GPU it would read what is not written yet: an `order` of old memory leads out of the tensor
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*tensors)
    tensors[0].neg_()
    graph.replay()
    assert torch.equal(out, FUNCTIONS[structure][0](*tensors)) and not torch.equal(out, expected)


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_compiles_without_a_graph_break(structure):
    tensors = make_inputs(structure, 64, 4, 16, 64, 32, 64, torch.bfloat16, "cuda")
    with ops.use_impl("triton"):
        compiled = torch.compile(FUNCTIONS[structure][0], fullgraph=True)
        out, expected = compiled(*tensors), FUNCTIONS[structure][0](*tensors)
    assert torch.equal(out, expected)


def test_autocast_runs_in_its_dtype():
    tensors = make_inputs("blast", 40, 4, 4, 32, 32, 48, torch.float32, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = ops.blast_linear(*tensors, impl="triton")
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


def test_training_builds_no_dense_weight():
    tensors = make_inputs("blast", 256, 4, 4, 1024, 1024, 128, torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.blast_linear(*tensors).sum().backward()
    # the dense weight alone would be 32 MiB
    assert torch.cuda.max_memory_allocated() - before < 24 * 2**20


@pytest.mark.parametrize("sizes", [[(256, 256)] * 3, [(512, 256), (128, 96), (128, 96)], [(43, 18)] * 2], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 600])
@pytest.mark.parametrize("structure", GROUPED)
def test_groups_keep_the_error_budget(structure, tokens, sizes):
    for blocks in ((4, 4), (4, 16), (16, 16)):
        settings = {"b1": blocks[0], "b2": blocks[1], "p": 64, "dtype": torch.bfloat16, "device": "cuda"}
        assert_grouped_within_budget(structure, tokens, sizes, bias=False, **settings)
        if blocks == (4, 16):
            assert_grouped_within_budget(structure, tokens, sizes, bias=True, **settings)


@pytest.mark.parametrize("structure", GROUPED)
@pytest.mark.parametrize("tokens", [1, 200])
def test_groups_run_in_a_cuda_graph(structure, tokens):
    factors, _ = make_layers(structure, [(64, 32), (64, 32), (16, 16)], dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, 16, device="cuda", dtype=torch.bfloat16)
    ops.grouped_linear(structure, x, factors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = ops.grouped_linear(structure, x, factors)
    x.neg_()
    graph.replay()
    assert all(map(torch.equal, outs, ops.grouped_linear(structure, x, factors)))


@pytest.mark.parametrize("structure", GROUPED)
def test_a_fused_model_under_torch_compile_and_a_static_cache(structure, monkeypatch):
    model = tiny_llama()
    hf_blr.compress(model, hf_blr.BLRConfig(structure, ratio=0.6, num_blocks=None if structure == "low_rank" else 4))
    model.cuda()
    inputs = {name: value.cuda() for name, value in tiny_inputs(model).items()}
    expected = model(**inputs).logits
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    tokens = model.generate(inputs["input_ids"][:, :5], disable_compile=True, **settings)
    assert len(hf_blr.fuse(model)) == 4
    # asked for by q, k and v together, and by gate and up
    calls, layers = [], ProjectionGroup.layers
    monkeypatch.setattr(ProjectionGroup, "layers", lambda self: calls.append(self) or layers(self))
    # float32, which is left to PyTorch where nobody asks for kernels
    with torch.no_grad(), ops.use_impl("triton"):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
        assert len(calls) == 4
        monkeypatch.undo()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(model.generate(inputs["input_ids"][:, :5], **settings), tokens)


def test_calibration_multiplies_in_tf32_and_leaves_the_process_as_it_was():
    layer = torch.nn.Linear(256, 256, bias=False, device="cuda")
    x = torch.randn(64, 256, device="cuda")
    right = (x.double() @ layer.weight.double().T).float()

    def error(out):
        return ((out - right).norm() / right.norm()).item()

    with calibrating(layer):
        assert 1e-5 < error(layer(x)) < 1e-3
    assert error(layer(x)) < 1e-6


@pytest.mark.parametrize("name, size", [("int8", 50.0), ("int4", 3.0), ("int2", 1.0), ("fp8", 150.0)])
def test_columns_are_rounded_as_the_plain_form_does(name, size):
    for shape, groups in (((72, 64), 32), ((3, 5, 33, 128), 64), ((13, 19), None)):
        storage = format_named(name, None if name == "fp8" else groups)
        columns = size * torch.randn(*shape, device="cuda")
        upper = 0.1 * torch.randn(*shape[:-2], shape[-1], shape[-1], device="cuda").triu(1)
        upper += torch.eye(shape[-1], device="cuda")
        assert runs_kernel(columns)
        found, expected = (form(columns, upper, storage) for form in (round_columns, plain_round_columns))
        # sums in another order may take a number over the middle between two codes, or another scale
        same = ((found.numbers - expected.numbers).abs() < 1e-3 * size).all(-1)
        assert same.float().mean() > 0.98


@pytest.mark.parametrize("name, size", [("int4", 64), ("int3", 48), ("int8", None), ("fp8", None)])
def test_factors_lose_by_rounding_what_they_lose_on_the_cpu(name, size):
    storage, losses = format_named(name, size), []
    weight, x, y = torch.randn(100, 384), torch.randn(800, 384), torch.randn(300, 100) @ torch.randn(100, 100)
    for device in ("cuda", "cpu"):
        w, gram, rows = weight.to(device), (x.T @ x).to(device), (y.T @ y).to(device)
        change = rounded_in_metric(w, gram, storage, rows).numbers(torch.float32) - w
        losses.append(((rows @ change) * (change @ gram)).sum().item())
    # one number that goes the other way moves all behind it
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("tokens", [1, 9, 16, 300])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_experts_give_what_the_loop_gives_in_float64(structure, tokens):
    experts = make_experts(structure, 16, 256, 320, 64, "cuda", torch.bfloat16)
    given = make_tokens(experts, tokens, 4, last=2)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    with torch.no_grad():
        wanted = copy.deepcopy(experts).double().one_by_one(*wide)
        for impl in ("auto", "triton", "reference"):
            with ops.use_impl(impl):
                found = experts(*given)
            assert ((found - wanted).norm() / wanted.norm()).item() < 1e-2, impl


@pytest.mark.parametrize("form, group", [("int4", 32), ("int8", None), ("fp8", None)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_experts_in_bits_give_what_the_loop_gives_in_float64(structure, form, group):
    storage = format_named(form, group)
    experts = make_experts(structure, 16, 256, 320, 64, "cuda", torch.bfloat16, storage)
    for tokens in (1, 9, 300):
        given = make_tokens(experts, tokens, 4, last=2)
        wide = [t.double() if t.is_floating_point() else t for t in given]
        with torch.no_grad():
            wanted = copy.deepcopy(experts).double().one_by_one(*wide)
            found = experts(*given)
        assert ((found - wanted).norm() / wanted.norm()).item() < 1e-2, tokens


@pytest.mark.parametrize("tokens", [1, 9, 300])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_experts_run_in_a_cuda_graph(structure, tokens):
    experts = make_experts(structure, 16, 256, 320, 64, "cuda", torch.bfloat16).requires_grad_(False)
    given, later = make_tokens(experts, tokens, 4), make_tokens(experts, tokens, 4)
    run = Timer("cuda").captured(lambda: given[0].copy_(experts(*given)))
    for kept, new in zip(given, later, strict=True):
        kept.copy_(new)
    wanted = experts(*later)
    run()
    torch.testing.assert_close(given[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_experts_compile(structure):
    experts = make_experts(structure, 16, 256, 320, 64, "cuda", torch.bfloat16).requires_grad_(False)
    compiled = torch.compile(experts, fullgraph=True, dynamic=False)
    for tokens in (1, 300):
        given = make_tokens(experts, tokens, 4)
        wanted = experts(*given)
        assert ((compiled(*given) - wanted).norm() / wanted.norm()).item() < 1e-2


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_of_experts(structure):
    experts = make_experts(structure, 16, 256, 320, 64, "cuda", torch.bfloat16)
    x, choice, weights = make_tokens(experts, 200, 4, last=2)
    exact, found = copy.deepcopy(experts).double(), []
    for module, run in ((exact, exact.one_by_one), (experts, experts)):
        given = x.to(module.down_proj.dtype).requires_grad_()
        out = run(given, choice, weights.to(given))
        (out * torch.linspace(0, 1, out.shape[1], device="cuda", dtype=out.dtype)).sum().backward()
        found.append([given.grad, *(p.grad for p in module.parameters())])
        x = x.detach()
    for actual, wanted in zip(found[1], found[0], strict=True):
        assert ((actual - wanted).norm() / wanted.norm()).item() < 2e-2
    assert not any(p.grad[-1].any() for p in experts.parameters())


@pytest.mark.parametrize("tokens", [40, 1000, 4096])
@pytest.mark.parametrize(
    "structure, blocks, rank",
    [
        ("low_rank", (1, 1), 256),
        ("pivoted", (1, 1), 320),
        ("dense", (1, 1), 1024),
        ("monarch", (4, 4), 64),
        ("monarch", (2, 8), 48),
        ("blast", (4, 4), 256),
        ("blast", (4, 16), 240),
        ("blast", (2, 6), 80),
        ("blast", (16, 3), 80),
    ],
)
def test_layers_in_float8_keep_the_error_budget(structure, blocks, rank, tokens):
    if torch.cuda.get_device_capability() < LEAST_FLOAT8:
        pytest.skip("the GPU does not multiply float8")
    torch.manual_seed(0)
    spec = structure_named(structure).spec(1024, 1536, rank, blocks)
    settings = {"device": "cuda", "dtype": torch.bfloat16, "storage": format_named("fp8")}
    module = BLRLinear.from_spec(spec, bias=structure != "dense", **settings).eval()
    if structure == "pivoted":
        module.order.copy_(torch.randperm(1024))
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    # one massive activation, none, and two other sizes
    x[0, 7], x[1], x[2], x[3] = 1000, 0, x[2] * 1e-6, x[3] * 1e6
    with torch.no_grad():
        assert module.route_in_bits(x) == FLOAT8
        out, wanted = module(x), exact(module, x)
        assert torch.equal(out[1], torch.zeros_like(out[1]) if module.bias is None else module.bias)
        for rows in (slice(4, None), slice(0, 1), slice(2, 3), slice(3, 4)):
            # what is stored is rounded too
            allowed = 1.05 * ROUNDINGS[structure] ** 0.5 * ONE_ROUNDING * (1 if rows.stop is None else 1.5)
            assert relative(out[rows], wanted[rows]) < allowed, rows
        run = Timer("cuda").captured(lambda: out.copy_(module(x)))
        out.zero_()
        run()
        assert torch.equal(out, module(x))
        if tokens == 1000:
            compiled = torch.compile(module, fullgraph=True)(x)
            # the cast is another kernel there
            assert relative(compiled[4:], wanted[4:]) < 1.05 * ROUNDINGS[structure] ** 0.5 * ONE_ROUNDING


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [2048, 35])
def test_training_in_float8_is_that_of_the_reference(tokens, compiled):
    if torch.cuda.get_device_capability() < LEAST_FLOAT8:
        pytest.skip("the GPU does not multiply float8")
    torch.manual_seed(0)
    # two layers on one input, the second of a rank whose rows fill no line of L2
    shapes = [(tokens, 1024), (1536, 256), (256, 1024), (512, 144), (144, 1024)]
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    grads = [torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in (1536, 512)]

    def step(impl):
        x, *factors = (t.clone().requires_grad_() for t in given)
        layers = [("low_rank", factors[:2], None), ("low_rank", factors[2:], None)]
        linears = torch.compile(ops.linears_in_float8, fullgraph=True) if compiled else ops.linears_in_float8
        outs = linears(x, layers, impl=impl)
        return *outs, *torch.autograd.grad(outs, (x, *factors), grads)

    for found, wanted in zip(step("triton"), step("reference"), strict=True):
        # one more rounding at most, of numbers between two of float8
        assert (found.float() - wanted.float()).norm() / wanted.float().norm() < 0.03


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [40, 1000, 4096])
@pytest.mark.parametrize(
    "structure, blocks, ranks",
    [
        ("low_rank", (1, 1), (256, 112)),
        ("monarch", (4, 4), (64, 32)),
        ("monarch", (2, 8), (48, 48)),
        ("blast", (4, 4), (256, 112)),
        ("blast", (4, 16), (240, 112)),
    ],
    ids=str,
)
def test_layers_in_float8_run_together(structure, blocks, ranks, tokens, bias):
    """The widest is cuBLAS' at many tokens, and stores between the others; factors have gaps between their blocks."""
    if torch.cuda.get_device_capability() < LEAST_FLOAT8:
        pytest.skip("the GPU does not multiply float8")
    torch.manual_seed(0)
    block, x = torch.nn.Module(), torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    for name, n, rank in zip(("q_proj", "k_proj", "v_proj"), (2048, 512, 512), (*ranks, ranks[1]), strict=True):
        spec = structure_named(structure).spec(1024, n, rank, blocks)
        settings = {"device": "cuda", "dtype": torch.bfloat16, "storage": format_named("fp8")}
        block.add_module(name, BLRLinear.from_spec(spec, bias=bias, **settings).eval())
        for held in block.get_submodule(name).parameters(recurse=False):
            torch.nn.init.normal_(held)
    assert hf_blr.fuse(block) == [("q_proj", "k_proj", "v_proj")]

    def assert_right(outs):
        for module, out in zip(block.children(), outs, strict=True):
            # of x, of what is between the stages, and of what is stored
            assert relative(out, exact(module, x)) < 1.06 * ROUNDINGS[structure] ** 0.5 * ONE_ROUNDING

    with torch.no_grad():
        assert_right([module(x) for module in block.children()])
        assert block.q_proj.group[0].unclaimed == 0
        if tokens == 1000:
            compiled = torch.compile(lambda x: [module(x) for module in block.children()], fullgraph=True)
            assert_right(compiled(x))


@pytest.mark.parametrize("structure, blocks", [*STRUCTURES.items(), ("dense", None)])
def test_fits_in_int4_take_grams_from_the_host(structure, blocks):
    """Those of a model that lies on the host, as `compress` has them."""
    torch.manual_seed(0)
    spec = structure_named(structure).spec(128, 192, {"monarch": 16, "dense": 128}.get(structure, 64), blocks or (1, 1))
    weight, x, y = torch.randn(192, 128), torch.randn(400, 128), torch.randn(300, 192) @ torch.randn(192, 192)
    gram, output_gram = x.T @ x, (y.T @ y)[None]
    errors = [
        factorize(weight.to(device), spec, gram, output_gram, storage=format_named("int4", 16)).rel_error
        for device in ("cuda", "cpu")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_stream_is_turned_as_on_the_cpu():
    on_cpu, on_gpu = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True).cuda()
    assert hf_blr.turn_stream(on_cpu) == hf_blr.turn_stream(on_gpu) > 0
    for found, wanted in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), wanted)


def test_what_is_compiled_ahead_is_all_that_a_forward_runs():
    import triton

    model = tiny_llama(hidden_size=256, intermediate_size=512)
    overrides = {r".*\.mlp\..*": {"structure": "dense", "dense_format": "int8"}}
    config = hf_blr.BLRConfig("low_rank", ratio=0.5, dataset=None, factor_format="int8", overrides=overrides)
    hf_blr.compress(model, config, progress=False)
    model = model.to("cuda", torch.bfloat16).eval()
    ids = torch.arange(9, device="cuda")[None]
    assert compile_kernels(model, (9,)) > 0
    compiled, listener = [], triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **said: compiled.append(said["metadata"]["name"])
    try:
        with torch.no_grad():
            found = model(ids).logits
            assert not compiled
            wanted = copy.deepcopy(model)(ids).logits
    finally:
        triton.knobs.compilation.listener = listener
    assert torch.equal(found, wanted) and found.isfinite().all()


def test_replayed_steps_write_the_text_that_others_write(monkeypatch):
    model = tiny_llama().to("cuda")
    replayed = write_windows(model, tiny_tokenizer(), 4, 24, progress=False)
    assert written.can_replay(model)
    monkeypatch.setattr(written, "can_replay", lambda model: False)
    plain = write_windows(model, tiny_tokenizer(), 4, 24, progress=False)
    # what rounds otherwise may change a token, and then all after it
    assert (replayed == plain).float().mean() > 0.5
