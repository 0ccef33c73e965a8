"""Training in float8: errors within what the format rounds, scales for each token, and the callback's door to it."""

import copy

import pytest
import torch
from float8_cases import patch_rounding
from float8_training_cases import N, layer, numbers
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tiny import tiny_llama
from torch._dynamo.backends.common import aot_autograd
from trainer_cases import trainer_for

import hf_blr
from hf_blr import BLRConfig, ops
from hf_blr.finetune import BLRCallback
from hf_blr.finetune.float8 import close_float8, open_float8
from hf_blr.inference.grouped import PATIENCE
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.ops import float8_training
from hf_blr.ops.float8_casts import cast, cast_both, cast_columns, transposed
from hf_blr.ops.float8_training import narrowed, why_not_float8
from hf_blr.ops.rules.bits import missing
from hf_blr.structures import Dense, LowRank, Monarch, structure_named

#: half a step of e4m3 over the number that it lies at: three bits, so at most 2^-4 of it, evenly spread
ROUNDING = 2**-4 / 3**0.5
#: operands that are rounded on the way to an output and to each gradient
ROUNDED = 4


def results(module, x, grad):
    """Output, dx and the gradients of all parameters, in their order."""
    x = x.clone().requires_grad_()
    out = module(x)
    gradients = torch.autograd.grad(out, (x, *module.parameters()), grad)
    return [out.detach(), *gradients]


def exactly(module, x, grad):
    wide = copy.deepcopy(module).double()
    wide.float8 = False
    return results(wide, x.double(), grad.double())


def relative(out, wanted):
    return ((out.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [48, 50])
def test_errors_are_those_of_rounding(structure, dtype, tokens):
    module = layer(structure, dtype)
    x, grad = (t.to(dtype) for t in numbers(tokens, spread=2.0))
    found, wanted = results(module, x, grad), exactly(module, x, grad)
    *products, bias = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    # as many roundings add up in squares; without any there would be no error in float32
    assert all(ROUNDING / 2 < error < ROUNDED**0.5 * ROUNDING for error in products)
    assert bias < 2**-7
    assert [t.dtype for t in found] == [dtype] * len(found)


def test_each_token_has_a_scale_of_its_own():
    module = layer()
    x, grad = numbers(32)
    small = 2.0**-30
    sizes = torch.ones(32, 1)
    sizes[::2] = small
    out, dx, *_ = results(module, x * sizes, grad * sizes)
    wanted_out, wanted_dx, *_ = exactly(module, x * sizes, grad * sizes)
    bias = module.bias.detach()
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert relative(dx[rows], wanted_dx[rows]) < ROUNDED**0.5 * ROUNDING
    # beside the bias, small tokens vanish
    assert relative(out[1::2] - bias, wanted_out[1::2] - bias) < ROUNDED**0.5 * ROUNDING


def test_inputs_that_lie_along_a_row_of_v_overflow_nowhere():
    """Products are left without their scales, up to the square of the largest number of float8."""
    module = layer(dtype=torch.float16)
    x, grad = (t.half() for t in numbers(32))
    x[:2] = module.v.detach()[:2] * 3
    found, wanted = results(module, x, grad), exactly(module, x, grad)
    assert all(relative(a, b) < ROUNDED**0.5 * ROUNDING for a, b in zip(found, wanted, strict=True))


def test_rows_of_zeros_still_get_gradients():
    """As of a factor that starts at zero, and of padding."""
    module = layer()
    module.u.data[::2] = 0
    x, grad = numbers(32)
    x[3], grad[5] = 0, 0
    found, wanted = results(module, x, grad), exactly(module, x, grad)
    assert all(relative(a, b) < ROUNDED**0.5 * ROUNDING for a, b in zip(found, wanted, strict=True))
    du, wanted_du = found[2], wanted[2]
    assert relative(du[::2], wanted_du[::2]) < ROUNDED**0.5 * ROUNDING and not found[1][5].any()


def test_what_overflowed_stays_no_number():
    """A gradient scaler looks for it."""
    x, grad = numbers(16)
    grad[3, 5] = float("inf")
    _, dx, du, dv, _ = results(layer(), x, grad)
    assert not (dx[3].isfinite().any() or du.isfinite().all() or dv.isfinite().all())


def test_only_wanted_gradients_and_no_tokens():
    module = layer()
    module.v.requires_grad_(False)
    x, grad = numbers(16)
    out = module(x)
    out.backward(grad)
    assert module.v.grad is None and module.u.grad is not None
    module.zero_grad()
    empty = module(x[:0].requires_grad_())
    empty.sum().backward()
    assert empty.shape == (0, N) and not module.u.grad.any()


@pytest.fixture
def kernels(monkeypatch, poisoned_buffers):
    pytest.importorskip("triton")
    patch_rounding(monkeypatch)


#: bytes of a line of L2
LINE = 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")
@pytest.mark.parametrize("tokens", [32, 35])
def test_a_step_by_kernels_and_pytorchs_product(kernels, monkeypatch, tokens):
    """As on a GPU: kernels cast and transpose, `torch._scaled_mm` multiplies, which runs on a CPU too."""
    asked, scaled_mm = [], torch._scaled_mm

    def watched(a, b, *args, **kwargs):
        asked.append([t.stride() for t in (a, b.T)])
        return scaled_mm(a, b, *args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    module = layer(dtype=torch.bfloat16)
    x, grad = (t.bfloat16() for t in numbers(tokens))
    wanted = results(module, x, grad)
    module.impl = "triton"
    found = results(module, x, grad)
    # by rows, as cuBLAS takes them; ranks and tokens that fill no line begin new ones, in what is an operand alone
    assert all(last == 1 and first % 16 == 0 for strides in asked for first, last in strides)
    assert [sum(first == LINE for first, _ in strides) for strides in asked] == [0, 2, 1, 0, 2, 0]
    # sums in another order, and numbers between two of float8 that fall to the other side for it
    assert all(relative(a, b.double()) < ROUNDING / 2 for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")
def test_layers_together_by_kernels_and_pytorchs_product(kernels):
    """What they share lies side by side: parts of it are cast and written as they lie."""
    torch.manual_seed(0)
    specs = [structure_named("low_rank").spec(64, n, rank, (1, 1)) for n, rank in ((48, 32), (32, 16))]
    layers = [BLRLinear.from_spec(spec, dtype=torch.bfloat16) for spec in specs]
    x, *grads = (torch.randn(32, size).bfloat16() for size in (64, 48, 32))

    def outputs_and_gradients(impl):
        leaf = x.clone().requires_grad_()
        outs = ops.linears_in_float8(
            leaf, [("low_rank", module.operands(leaf), module.bias) for module in layers], impl
        )
        learnt = [leaf, *(p for module in layers for p in module.parameters())]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, learnt, grads)]

    found, wanted = (outputs_and_gradients(impl) for impl in ("triton", "reference"))
    assert [t.shape for t in found] == [t.shape for t in wanted] and len(found) == 9
    assert all(relative(a, b.double()) < ROUNDING / 2 for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")
@pytest.mark.parametrize("shape", [(16, 48), (33, 17), (1, 40), (0, 16)])
def test_codes_are_transposed(kernels, shape):
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    rows, scale = transposed(codes, False)
    assert torch.equal(rows.float(), codes.float().T) and torch.equal(scale, torch.ones(shape[1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")
@pytest.mark.parametrize("shape", [(48, 33), (2, 16)])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_takes_a_scale_before_it_is_cast(kernels, shape, count):
    t = torch.randn(shape)
    t[:, 3] = 0
    rows, columns = ([torch.randn(size).exp() for _ in range(count)] for size in shape)
    # what goes into the scale of the result, which lies along the other axis
    outer = [torch.randn(size).exp() if count else None for size in shape]
    t[0, 1] = float("nan")
    for found, wanted in (
        *zip(cast_both(t, False), cast_both(t, True), strict=True),
        [cast(t, emulated, columns, outer[0]) for emulated in (False, True)],
        [cast_columns(t, emulated, rows, outer[1]) for emulated in (False, True)],
    ):
        torch.testing.assert_close(found.scale, wanted.scale, equal_nan=True)
        numbers = [part.codes.float() * part.scale[:, None] for part in (found, wanted)]
        # a scale may lie along the other axis
        missing = wanted.codes.isnan() if wanted.scale.isfinite().all() else wanted.scale.isnan()
        assert missing.any() and torch.equal(numbers[0][missing].isnan(), numbers[1][missing].isnan())
        # a number between two codes may go to either
        assert relative(numbers[0][~missing], numbers[1][~missing].double()) < 3e-3 and found.codes.stride(1) == 1


def seen_by_compilers(call):
    """The names of what is in the forward's and the backward's graph."""
    seen = []

    def watched(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        seen.extend(str(node.kwargs.get("dtype")) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=watched, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(call, fullgraph=True, backend=backend), seen


def test_a_layer_compiles_as_one_graph_that_leaves_the_products_alone():
    module = layer()
    x, grad = numbers(32)
    wanted = results(module, x, grad)
    compiled, seen = seen_by_compilers(module)
    found = results(compiled, x, grad)
    assert all(relative(a, b.double()) < 1e-5 for a, b in zip(found, wanted, strict=True))
    for name in ("transpose", "pairs", "pairs_backward"):
        assert f"hf_blr.float8_{name}.default" in seen
    # the casts of x and of the gradient join what makes them
    assert seen.count("torch.float8_e4m3fn") == 2 and "hf_blr.float8_cast.default" not in seen
    # a compiler that saw them has made zeros of some
    assert not any("mm" in name for name in seen)


def test_compiled_layers_with_one_input_cast_and_transpose_it_once():
    one, other = layer(), layer()
    both, seen = seen_by_compilers(lambda x: one(x) * other(x))
    both(numbers(32)[0].requires_grad_()).sum().backward()
    found = [seen.count(f"hf_blr.float8_{name}.default") for name in ("transpose", "pairs", "pairs_backward")]
    # x, and the gradient of each
    assert found == [1, 2, 2] and seen.count("torch.float8_e4m3fn") == 3


def test_compiled_casts_lie_as_products_read_them():
    t = torch.randn(48, 16).T
    (codes, scale), (wanted, wanted_scale) = (
        call(t, True) for call in (torch.compile(narrowed, backend="aot_eager", fullgraph=True), narrowed)
    )
    assert codes.is_contiguous() and wanted.is_contiguous()
    assert torch.equal(codes.float(), wanted.float()) and torch.equal(scale, wanted_scale)


def test_the_mode_decides_and_not_gradients():
    """A checkpointed block runs without gradients first, and must compute the same again with them."""
    module, (x, _) = layer(), numbers(16)
    with torch.no_grad():
        training, evaluating = module(x), module.eval()(x)
    module.float8 = False
    assert torch.equal(evaluating, module(x)) and relative(training, evaluating.double()) > ROUNDING / 2
    module.float8 = True
    assert torch.equal(training, module.train()(x))


def test_products_asked_for_by_name(monkeypatch):
    module, (x, _) = layer(), numbers(16)
    for impl in ("auto", "reference"):
        with ops.use_impl(impl):
            assert module(x).isfinite().all()
    with ops.use_impl("dense"), pytest.raises(ValueError, match="no form in float8"):
        module(x)
    monkeypatch.setattr(float8_training, "why_not_triton", lambda *_: None)
    monkeypatch.setattr(float8_training, "missing", lambda found, _: missing(found, (8, 6)))
    with ops.use_impl("triton"), pytest.raises(RuntimeError, match=r"8\.9, the GPU has 8\.6; use impl=.auto. or"):
        module(x)


def test_which_layers_can():
    assert why_not_float8(LowRank(64, 32, 16)) is None
    assert "multiples of 16, got (64, 8, 32)" in why_not_float8(LowRank(64, 32, 8))
    assert "stacks of blocks" in why_not_float8(Monarch(64, 32, 8, (4, 4)))
    assert why_not_float8(Dense.whole(64, 64)) is not None


def compressed(**kw):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    hf_blr.compress(model, BLRConfig("low_rank", rank=16, **kw), progress=False)
    return model


def test_a_stock_trainer_in_float8(tmp_path, capsys, caplog):
    start = compressed()
    inside = []

    class Watching(BLRCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            inside.append({module.float8 for module in blr_modules(kwargs["model"]).values()})

    def losses(**kw):
        model = copy.deepcopy(start)
        trainer = trainer_for(model, tmp_path, Watching(**kw), max_steps=12)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model

    wide, _ = losses()
    with caplog.at_level("WARNING"):
        narrow, model = losses(train_float8=True)
    assert inside == [{False}] * 12 + [{True}] * 12
    # far more than what rounding adds to any single loss
    assert narrow != wide and narrow[-1] < narrow[0] - 0.9 * (wide[0] - wide[-1]) and wide[-1] < wide[0]
    assert not any(module.float8 for module in blr_modules(model).values())
    assert f"{len(blr_modules(model))} of them with products in float8" in capsys.readouterr().out
    assert "multiplied in float32, which saves no time" in caplog.text


def test_a_model_of_which_few_layers_can():
    model = compressed(overrides={"q_proj": {"structure": "monarch", "rank": 4}, "k_proj": {"rank": 8}})
    opened, said = open_float8(model)
    assert len(opened) == 5 * 2 and not any(name.endswith(("q_proj", "k_proj")) for name in opened)
    assert said.startswith("4 layers train in the dtype of the model: monarch multiplies stacks of blocks")
    close_float8(model)
    assert not any(module.float8 for module in blr_modules(model).values())
    for bad in (compressed(overrides={".*": {"rank": 8}}), compressed(factor_format="int8")):
        with pytest.raises(ValueError, match="no layer of LlamaForCausalLM can train in float8"):
            open_float8(bad)


def steps_of(model, ids, weights):
    """Gradients of all factors of an arbitrary sum of the last hidden states."""
    model.zero_grad()
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    (hidden.float() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith(("_proj.u", "_proj.v"))}


@pytest.fixture
def counted(monkeypatch):
    """How many layers each call of the op had."""
    found, pairs = [], torch.ops.hf_blr.float8_pairs

    def called(codes, scale, vs, us, emulated):
        found.append(len(vs))
        return pairs(codes, scale, vs, us, emulated)

    monkeypatch.setattr(torch.ops.hf_blr, "float8_pairs", called)
    return found


def test_layers_with_one_input_multiply_together(counted):
    model, ids, weights = compressed().train(), torch.arange(32)[None], torch.randn(32, 64)
    exact = steps_of(model, ids, weights)
    open_float8(model)
    found = steps_of(model, ids, weights)
    assert counted == [3, 1, 2, 1] * 2
    for module in blr_modules(model).values():
        module.float8_group = None
    alone = steps_of(model, ids, weights)
    assert counted[8:] == [1] * 14
    # a token's dy of several layers has one scale, which rounds as finely as one of each
    errors = [[relative(g[name], exact[name].double()) for name in exact] for g in (found, alone)]
    assert sum(errors[0]) < 1.1 * sum(errors[1])
    last = f"model.layers.{len(model.model.layers) - 1}.mlp.down_proj.u"
    assert torch.equal(found[last], alone[last]) or relative(found[last], alone[last].double()) < 1e-2


def test_compiled_layers_multiply_together():
    model, ids, weights = compressed().train(), torch.arange(32)[None], torch.randn(32, 64)
    open_float8(model)
    wanted = steps_of(model, ids, weights)
    (one, other), all_seen = (block.mlp for block in model.model.layers), []
    for mlp in (one, other):
        mlp.forward, seen = seen_by_compilers(mlp.forward)
        all_seen.append(seen)
    found = steps_of(model, ids, weights)
    assert all(relative(found[name], wanted[name].double()) < 1e-4 for name in wanted)
    # gate and up, and down
    assert [seen.count("hf_blr.float8_pairs.default") for seen in all_seen] == [2, 2]


def test_a_group_whose_layers_read_other_inputs_after_all(counted):
    model = compressed().train()
    open_float8(model)
    q, k = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    torch.manual_seed(0)
    x, other = torch.randn(2, 16, 64)
    alone = [module(x) for module in map(copy.deepcopy, (q, k))]
    counted.clear()
    assert torch.equal(q(x), alone[0])
    x.add_(1)
    # what waits is of what x was
    changed = k(x)
    assert not torch.equal(changed, alone[1]) and counted == [3, 3]
    for _ in range(PATIENCE):
        q(torch.randn(16, 64))
    counted.clear()
    q(other), k(other)
    assert counted == [1, 1]
