"""Low-rank factors stored with pivots: the same matrix, fewer numbers, and integers that no cast may touch."""

import copy

import pytest
import torch
from kernel_cases import assert_within_budget, make_inputs, wide
from tiny import tiny_gpt2, tiny_llama, tiny_logits
from torch import nn
from transformers import AutoModelForCausalLM

import hf_blr
from hf_blr import BLRConfig, ops
from hf_blr.calibration.stand_ins import with_stand_ins
from hf_blr.factorize import factorize
from hf_blr.finetune import refine
from hf_blr.integration import blr_modules
from hf_blr.linear import BLRLinear
from hf_blr.structures import LowRank, Pivoted, make_spec
from hf_blr.structures.low_rank.layer import LowRankLinear
from hf_blr.structures.pivoted.pivots import LARGEST, pivoted
from hf_blr.structures.pivoted.reference import pivoted_dense, pivoted_linear

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")


def random_pair(n=24, k=32, r=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, r, generator=generator, dtype=torch.float64)
    return u, torch.randn(r, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("r", [1, 9, 24, 32])
def test_the_same_matrix_with_small_numbers(r):
    u, v = random_pair(r=r)
    # directions of very different size, and features of very different size
    v = torch.logspace(0, -6, r, dtype=torch.float64)[:, None] * v * torch.logspace(3, -3, 32, dtype=torch.float64)
    tensors = pivoted(u, v)
    torch.testing.assert_close(pivoted_dense(**tensors), u @ v, rtol=1e-8, atol=1e-8)
    assert sorted(tensors["order"].tolist()) == list(range(32)) and tensors["order"].dtype == torch.int32
    assert all(part.equal(part.sort().values) for part in (tensors["order"][:r], tensors["order"][r:]))
    assert r == 32 or tensors["c"].abs().max() <= LARGEST
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"u": (24, r), "c": (r, 32 - r), "order": (32,)}


def test_fewer_directions_than_rank():
    u, v = random_pair()
    v[4:] = 0
    tensors = pivoted(u, v)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    torch.testing.assert_close(pivoted_dense(**tensors), u @ v)


def test_a_fit_is_low_rank_with_more_rank():
    weight, x = torch.randn(48, 64), torch.randn(500, 64) * torch.logspace(1, -1, 64)
    gram = x.T @ x
    spec, plain = (make_spec(s, 64, 48, ratio=0.6) for s in ("pivoted", "low_rank"))
    assert spec.rank >= 19 and plain.rank == 16 and spec.num_parameters <= 0.6 * 64 * 48
    same = factorize(weight, LowRank(64, 48, spec.rank), gram)
    fitted = factorize(weight, spec, gram)
    assert fitted.rel_error == pytest.approx(same.rel_error, rel=1e-4)
    assert fitted.rel_error < 0.9 * factorize(weight, plain, gram).rel_error


@pytest.mark.parametrize("k, n", [(64, 48), (48, 64), (17, 17)])
def test_every_budget_below_the_dense_matrix_buys_almost_all_of_it(k, n):
    # unlike low-rank, whose factors of full rank are larger than the matrix
    assert make_spec("pivoted", k, n, ratio=0.999).rank >= 0.7 * min(k, n)
    assert Pivoted(k, n, min(k, n)).num_parameters <= k * n + k


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_files_keep_integers_whatever_the_dtype(make, tmp_path):
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    config = BLRConfig("pivoted", ratio=0.6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", blr_config=config, dtype=torch.bfloat16)
    orders = {name: module.order for name, module in blr_modules(model).items()}
    assert orders and all(order.dtype == torch.int32 for order in orders.values())
    # not the order that a fresh module has
    assert any(not torch.equal(order, torch.arange(len(order)).int()) for order in orders.values())
    model.save_pretrained(tmp_path / "blr")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "blr", dtype=torch.float16)
    for name, module in blr_modules(loaded).items():
        assert torch.equal(module.order, orders[name]) and module.u.dtype == torch.float16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "blr")
    assert torch.equal(tiny_logits(again), tiny_logits(model))


def test_a_file_without_the_order_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", blr_config=BLRConfig("pivoted", ratio=0.6))
    model.save_pretrained(tmp_path / "blr")
    file = tmp_path / "blr" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.order"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.order"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "blr")


def test_casts_copies_and_dense_forms():
    module = BLRLinear.from_spec(Pivoted(32, 24, 9), dtype=torch.float64)
    module.order.copy_(torch.randperm(32))
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = module(x)
    half = copy.deepcopy(module).bfloat16()
    assert half.order.dtype == torch.int32 and half.u.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(module.to_dense()(x), expected)
    assert {name for name, _ in module.named_parameters()} == {"u", "c", "bias"}


@interpreted
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_any_order_of_any_integers_in_any_memory(tokens, index):
    x, u, c, order, bias = make_inputs("pivoted", tokens, 1, 1, 30, 20, 7, torch.float32)
    # every other feature of wider rows, and columns of wider factors
    wide_x = torch.randn(tokens, 60)
    apart = torch.stack([order, order], 1)[:, 0].to(index)
    factors = [torch.cat([t, t], 1)[:, : t.shape[1]].detach().requires_grad_() for t in (u, c)]
    got = ops.pivoted_linear(wide_x[:, ::2], *factors, apart, bias, impl="triton")
    exact = pivoted_linear(*wide((wide_x[:, ::2], u, c)), order, bias.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("k, n, r", [(17, 20, 1), (17, 20, 17), (17, 5, 16), (1, 3, 1), (96, 64, 32)])
def test_edges_of_the_rank(k, n, r, tokens):
    """One pivot; no other feature; one other; one input."""
    assert_within_budget("pivoted", make_inputs("pivoted", tokens, 1, 1, k, n, r, torch.float32))


@interpreted
def test_more_tokens_than_are_decoded(monkeypatch):
    """cuBLAS multiplies then, behind the gather."""
    from hf_blr.ops.triton import pivoted as kernels

    monkeypatch.setattr(kernels, "decode_expand", None)
    for tokens, r in ((17, 30), (33, 9)):
        assert_within_budget("pivoted", make_inputs("pivoted", tokens, 1, 1, r + 3, 4, r, torch.float32))


#: three of them name no feature of 30
DAMAGED = torch.tensor([31, -2, 7, 2**31 - 1, *range(26)], dtype=torch.int32)


@interpreted
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_indices_out_of_range_read_zeros(tokens):
    _, u, c, _, bias = make_inputs("pivoted", tokens, 1, 1, 30, 20, 7, torch.float32)
    # what lies around x in memory is not to be read
    around = torch.full((tokens + 2, 30), float("nan"))
    x = around[1:-1].normal_()
    with torch.no_grad():
        got = ops.pivoted_linear(x, u, c, DAMAGED, bias, impl="triton")
        rows = torch.where((DAMAGED >= 0) & (DAMAGED < 30), x[:, DAMAGED.clamp(0, 29)], 0)
        exact = pivoted_linear(rows.double(), u.double(), c.double(), torch.arange(30), bias.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        pivoted_linear(x, u, c, DAMAGED, bias)


@interpreted
def test_indices_out_of_range_write_nothing():
    from hf_blr.ops.triton.columns import move_columns

    around = torch.zeros(5, 30)
    order = DAMAGED.clone()
    # far enough to fall on memory that the test can look at
    order[3] = 61
    move_columns(around[1:4], torch.ones(3, 7), torch.ones(3, 23), order, scatter=True)
    assert around[[0, 4]].eq(0).all() and around[1:4].sum() == 3 * 26


@interpreted
def test_the_backward_keeps_y_and_nothing_as_large_as_x():
    tensors = make_inputs("pivoted", 40, 1, 1, 30, 20, 7, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.pivoted_linear(*tensors, impl="triton")
    assert [tuple(t.shape) for t in saved] == [(40, 30), (20, 7), (7, 23), (30,), (40, 7)]
    assert saved[0].data_ptr() == tensors[0].data_ptr()


def test_fuse_leaves_it_alone():
    model = tiny_llama()
    hf_blr.compress(model, BLRConfig("pivoted", ratio=0.6), progress=False)
    before = tiny_logits(model)
    hf_blr.fuse(model)
    assert all(module.group is None for module in blr_modules(model).values())
    assert torch.equal(tiny_logits(model), before)


def test_it_trains():
    module = BLRLinear.from_spec(Pivoted(16, 12, 5))
    target, x = nn.Linear(16, 12), torch.randn(64, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (module(x) - target(x).detach()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def plain_average(average, now):
    """Of everything in the state dict, into the average's own tensors."""
    for name, value in average.state_dict().items():
        value.copy_(0.9 * value + (1 - 0.9) * now.state_dict()[name])


def average_past_the_version(average, now):
    for old, new in zip(average.buffers(), now.buffers(), strict=True):
        old.data.copy_(0.9 * old.data + (1 - 0.9) * new.data)
    average.eval()


def average_in_a_dictionary(average, now):
    state = {name: value.float() for name, value in average.state_dict().items()}
    for name, value in now.state_dict().items():
        state[name] = 0.9 * state[name] + (1 - 0.9) * value
    average.load_state_dict(state)


@pytest.mark.parametrize("average", [plain_average, average_past_the_version, average_in_a_dictionary])
def test_an_average_written_by_hand_keeps_the_order(average):
    now = nn.Sequential(BLRLinear.from_spec(Pivoted(96, 64, 20)))
    smooth, x = copy.deepcopy(now), torch.randn(3, 96)
    # the numbers are such that cutting off changes some
    assert not torch.equal((0.9 * now[0].order + (1 - 0.9) * now[0].order).int(), now[0].order)
    for _ in range(3):
        average(smooth, now)
    torch.testing.assert_close(smooth(x), now(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(smooth[0].order, now[0].order) and smooth[0].order.dtype == torch.int32
    now.load_state_dict(smooth.state_dict())


def test_an_averaged_model_with_its_buffers_keeps_the_order():
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    model, x = nn.Sequential(BLRLinear.from_spec(Pivoted(96, 64, 20))), torch.randn(3, 96)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        average.update_parameters(model)
    # cut off by the update, put right before it is used
    assert not torch.equal(average.module[0].order, model[0].order)
    torch.testing.assert_close(average(x), model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(average.module[0].order, model[0].order)
    average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())


def test_another_order_is_taken_and_an_average_of_two_is_refused():
    model, other = (BLRLinear.from_spec(Pivoted(96, 64, 20)) for _ in range(2))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1)).int()
    other.order.copy_(order)
    assert torch.equal(other.state_dict()["order"], order)
    mean = (other.order + model.order) // 2
    other.order.copy_(mean)
    with pytest.raises(ValueError, match="order: expected each integer of 0 to 95 once.*copy integers"):
        other(torch.randn(3, 96))
    with pytest.raises(RuntimeError, match="order: expected each integer of 0 to 95 once"):
        model.load_state_dict({**model.state_dict(), "order": mean})
    with pytest.raises(RuntimeError, match="order: expected integers, got torch.float32"):
        model.load_state_dict({**model.state_dict(), "order": mean.float()})


def test_layers_are_pairs_while_they_are_trained():
    model = tiny_gpt2()
    hf_blr.compress(model, BLRConfig("pivoted", ratio=0.6), progress=False)
    before, first = copy.deepcopy(model), model.transformer.h[0].attn.c_attn
    with with_stand_ins(model):
        pair = model.transformer.h[0].attn.c_attn
        assert isinstance(pair, LowRankLinear) and pair.spec.rank == first.spec.rank and pair.transposed
        gram = pair.u.T @ pair.u
        torch.testing.assert_close(gram, pair.v @ pair.v.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-4)
        torch.testing.assert_close(tiny_logits(model), tiny_logits(before), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            pair.v.add_(0.1 * torch.randn(pair.v.shape, generator=torch.Generator().manual_seed(0)))
        moved = pair.dense_weight().detach()
    assert model.transformer.h[0].attn.c_attn is first
    torch.testing.assert_close(first.dense_weight(), moved, rtol=1e-4, atol=1e-5)
    for (name, old), new in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new) != name.startswith("transformer.h.0.attn.c_attn") or name.endswith("bias"), name


def test_refinement_trains_pairs():
    model = tiny_llama()
    hf_blr.compress(model, BLRConfig("pivoted", ratio=0.5), progress=False)
    windows = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    history = refine(model, tiny_llama(), windows, epochs=10, batch_size=4, learning_rate=3e-3)
    losses = [entry["lm_loss"] for entry in history if "lm_loss" in entry]
    assert {type(module).__name__ for module in blr_modules(model).values()} == {"PivotedLinear"}
    with torch.no_grad():
        # what was trained is what the pivoted layers hold
        assert losses[0] > model(windows, labels=windows).loss == pytest.approx(losses[-1], rel=2e-3)
