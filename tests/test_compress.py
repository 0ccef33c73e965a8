"""compress on models in memory: calibration, swapping, reports and refusals."""

import pytest
import torch
from tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit
from torch import nn

from hf_blr import BLRConfig, collect_statistics, compress, to_dense
from hf_blr.calibration.blockwise import BlockChain, iterate_grams, whole_model_grams
from hf_blr.calibration.fisher import Statistics
from hf_blr.dense import dense_weight, is_transposed
from hf_blr.factorize import FitOptions, factorize
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.linear import BLRLinear
from hf_blr.plan import resolve_plan
from hf_blr.targets import find_targets

TEXT = ["The quick brown fox jumps over the lazy dog, again and again. " * 40]


def token_batches(n=3, b=2, t=16, vocab=257, seed=0):
    return [{"input_ids": x} for x in torch.randint(0, vocab, (n, b, t), generator=torch.Generator().manual_seed(seed))]


def inputs_of(model, name, batches):
    """The rows that reach one layer, gathered by a plain hook."""
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_grams_block_by_block_equal_those_of_a_whole_pass(build):
    model, batches = build(), token_batches()
    names = list(resolve_plan(model, BLRConfig("low_rank", ratio=0.5)))
    with torch.no_grad():
        assert len(BlockChain.trace(model, names, batches).segments) == 1
    whole = whole_model_grams(model, names, batches)
    groups = list(iterate_grams(model, names, batches))
    assert len(groups) == 2
    for group in groups:
        for name, gram in group.items():
            rows = inputs_of(model, name, batches)
            torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(whole[name], gram, rtol=1e-4, atol=1e-3)


def test_layers_with_one_input_share_one_gram():
    model = tiny_llama()
    config = BLRConfig("low_rank", ratio=0.5, fisher=False)
    grams = collect_statistics(model, config, calibration=token_batches()).grams
    attention = [grams[f"model.layers.0.self_attn.{p}_proj"] for p in "qkvo"]
    assert attention[0] is attention[1] is attention[2] is not attention[3]
    assert grams["model.layers.0.mlp.gate_proj"] is grams["model.layers.0.mlp.up_proj"]


def test_a_layer_that_stops_sharing_keeps_its_own_sum():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, fork):
            return self.left(x) + self.right(2 * x if fork else x)

    model, x = Forked(), torch.randn(5, 3)
    batches = [{"x": x, "fork": torch.tensor(flag)} for flag in (False, True)]
    grams = whole_model_grams(model, ["left", "right"], batches)
    torch.testing.assert_close(grams["left"], 2 * x.T @ x)
    torch.testing.assert_close(grams["right"], 5 * x.T @ x)


def test_layers_whose_input_is_written_to_between_them_share_no_gram():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.left(x) + self.right(x.mul_(2))

    x = torch.randn(5, 3)
    grams = whole_model_grams(InPlace(), ["left", "right"], [{"x": x.clone()}])
    torch.testing.assert_close(grams["left"], x.T @ x)
    torch.testing.assert_close(grams["right"], 4 * x.T @ x)


@torch.inference_mode()
def test_a_fit_without_gradients_runs_in_inference_mode():
    config = BLRConfig("low_rank", ratio=0.5, fisher=False)
    assert len(compress(tiny_llama(), config, calibration=token_batches(), progress=False).layers) == 14


def test_later_blocks_are_fitted_to_the_dense_models_activations():
    model, batches = tiny_llama(), token_batches()
    name = "model.layers.1.mlp.down_proj"
    rows = inputs_of(model, name, batches)
    spec = resolve_plan(model, BLRConfig("low_rank", ratio=0.4))[name].spec
    options = FitOptions(damping=(96 / len(rows)) ** 0.5)
    weight = dense_weight(model.get_submodule(name))
    fitted = factorize(weight, spec, rows.T @ rows, options=options).tensors
    lost = (weight - fitted["u"] @ fitted["v"]) @ rows.T
    config = BLRConfig("low_rank", ratio=0.4, sequential=False, fisher=False)
    report = compress(model, config, calibration=batches, progress=False)
    assert {r.name: r for r in report.layers}[name].rel_error == pytest.approx(
        (lost.norm() / (weight @ rows.T).norm()).item(), rel=1e-3
    )


def limit_rank(model, rank):
    """Makes every target's matrix one of this rank."""
    for name in find_targets(model):
        module = model.get_submodule(name)
        u, v = low_rank_factors(dense_weight(module), rank)
        module.weight.data = (u @ v).T.contiguous() if is_transposed(module) else u @ v
    return model


@pytest.mark.parametrize(
    "structure, tolerance", [("low_rank", 1e-3), ("pivoted", 1e-3), ("monarch", 1e-3), ("blast", 0.05)]
)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_vit])
def test_a_model_that_is_low_rank_already_is_kept(structure, tolerance, build):
    model = limit_rank(build(), 4)
    inputs = token_batches()[0]
    if build is tiny_vit:
        size = model.config.image_size
        inputs = {"pixel_values": torch.randn(2, model.config.num_channels, size, size)}
    with torch.no_grad():
        before = model(**inputs).logits
        config = BLRConfig(structure, ratio=0.7, num_blocks=None if structure in ("low_rank", "pivoted") else 2)
        report = compress(model, config, progress=False)
        after = model(**inputs).logits
    assert report.fitted_to == "weights" and report.mean_rel_error < tolerance
    assert (after - before).norm() < 2 * tolerance * before.norm()
    assert all(isinstance(model.get_submodule(layer.name), BLRLinear) for layer in report.layers)


def test_fitting_to_activations_beats_fitting_to_weights_on_them():
    batches = token_batches(n=8)
    dense = tiny_llama()
    errors = {}
    for kind, kw in (("weights", {}), ("activations", {"calibration": batches})):
        model = tiny_llama()
        compress(model, BLRConfig("low_rank", ratio=0.5), progress=False, **kw)
        with torch.no_grad():
            errors[kind] = sum((model(**b).logits - dense(**b).logits).norm().item() for b in batches)
    assert errors["activations"] < 0.9 * errors["weights"]


def test_report_counts_what_is_there():
    model = tiny_llama()
    before = sum(p.numel() for p in model.parameters())
    config = BLRConfig(ratio=0.5, num_blocks=4, dataset=TEXT, num_samples=4, seqlen=32)
    report = compress(model, config, tokenizer=tiny_tokenizer(), progress=False)
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.calibration_tokens == 4 * 32
    assert report.ratio <= 0.5
    assert [layer.name for layer in report.layers] == list(model.config.quantization_config.layers)
    assert report.to_dict()["layers"][0]["spec"]["structure"] == "blast"
    assert len(report.layers) + len(report.left_dense) == 14
    assert f"{len(report.layers)} layers" in str(report)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_parameters_lie_where_products_round_alike(build, tmp_path):
    build().save_pretrained(tmp_path / "dense")
    model = type(build()).from_pretrained(tmp_path / "dense")
    mapped = sum(p.data_ptr() % 64 != 0 for p in model.parameters())
    assert mapped, "tensors mapped from a file are expected to start at any address"
    compress(model, BLRConfig("blast", ratio=0.6, num_blocks=2), progress=False)
    model.save_pretrained(tmp_path / "blr")
    again = type(model).from_pretrained(tmp_path / "blr")
    for each in (model, again):
        assert not [name for name, p in each.named_parameters() if p.data_ptr() % 64]
    assert again.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    if build is tiny_gpt2:
        assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize("sequential", [True, False])
def test_statistics_serve_several_structures_and_equal_a_calibrated_run(sequential):
    config = BLRConfig("blast", ratio=0.5, num_blocks=2, sequential=sequential)
    batches = token_batches()
    statistics = collect_statistics(tiny_llama(), config, calibration=batches)
    given = {"calibration": batches} if sequential else {}
    one = compress(tiny_llama(), config, statistics=statistics, **given, progress=False)
    two = compress(tiny_llama(), config, calibration=batches, progress=False)
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.spec == b.spec
        assert a.rel_error == pytest.approx(b.rel_error, rel=2e-2)
    empty = Statistics({}, {}, 1)
    with pytest.raises(ValueError, match="statistics.grams holds no matrix for model.layers.0.self_attn.q_proj"):
        compress(tiny_llama(), config, statistics=empty)


def test_a_stored_plan_is_taken_as_it_is():
    model = tiny_llama()
    config = BLRConfig("low_rank", ratio=0.5)
    compress(model, config, progress=False)
    edited = BLRConfig(**model.config.quantization_config.to_dict())
    edited.layers = {k: {**v, "rank": 2} for k, v in edited.layers.items() if "q_proj" in k}
    again = tiny_llama()
    report = compress(again, edited, progress=False)
    assert [layer.spec.rank for layer in report.layers] == [2, 2]
    edited.layers = {"model.layers.0.mlp.up_proj": next(iter(edited.layers.values()))}
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: the plan says .*64 -> 64.*64 -> 96"):
        compress(tiny_llama(), edited, progress=False)


@pytest.mark.parametrize("kind", ["nan", "twice", "empty", "short", "no tokenizer", "no text"])
def test_refusals_leave_the_model_as_it_was(kind):
    model, config, arguments = tiny_llama(), BLRConfig("low_rank", ratio=0.5), {}
    if kind == "nan":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
        message = r"model.layers.1.mlp.up_proj.weight: 1 of 6144 values are NaN"
    elif kind == "twice":
        compress(model, config, progress=False)
        message = "compressed already.*to_dense"
    elif kind == "empty":
        arguments, message = {"calibration": []}, "holds no batch"
    else:
        text = {"short": ["word"], "no tokenizer": TEXT, "no text": ["", " "]}[kind]
        config = BLRConfig("low_rank", ratio=0.5, dataset=text, seqlen=64)
        arguments = {} if kind == "no tokenizer" else {"tokenizer": tiny_tokenizer()}
        message = {"short": "tokens", "no tokenizer": "needs a tokenizer", "no text": "no text"}[kind]
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        compress(model, config, progress=False, **arguments)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_to_dense_gives_a_model_that_can_be_compressed_again():
    model, batch = tiny_gpt2(), token_batches()[0]
    compress(model, BLRConfig("blast", ratio=0.5, num_blocks=4), progress=False)
    with torch.no_grad():
        compressed = model(**batch).logits
        dense = to_dense(model)(**batch).logits
    torch.testing.assert_close(dense, compressed, rtol=1e-4, atol=1e-4)
    assert len(compress(model, BLRConfig("low_rank", ratio=0.9, target_modules=["c_fc"]), progress=False).layers) == 2


def test_a_plain_module_can_be_compressed():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    report = compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "block-by-block"])
def test_calibration_does_not_pay_for_the_head(whole):
    model, batches = tiny_llama(), token_batches()
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    names = list(resolve_plan(model, BLRConfig("low_rank", ratio=0.5)))
    gather = whole_model_grams if whole else lambda *a: list(iterate_grams(*a))
    gather(model, names, batches)
    assert not ran
    # with labels only the whole model knows what to do
    gather(model, names, [{**batch, "labels": batch["input_ids"]} for batch in batches])
    assert ran
