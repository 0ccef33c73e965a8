"""Experts in 3-D parameters: found, fitted one by one, stored in batches, run, trained, and made dense again."""

import copy
import json

import pytest
import torch
from expert_cases import deepseek_v3, gpt_oss, llama4, olmoe, qwen2_moe, qwen3_moe
from tiny import batches_for, divergence, tiny_inputs, tiny_logits, tiny_mixtral, tiny_tokenizer
from zoo_inputs import plain_grams

from hf_blr import BLRConfig, collect_statistics, compress, fuse, to_dense
from hf_blr.calibration.problem import Problem
from hf_blr.calibration.routed import pooled
from hf_blr.cli import main
from hf_blr.compression import replace
from hf_blr.compression.allocation import loss_curve
from hf_blr.compression.budget import share_budget
from hf_blr.compression.layer_trials import Layer
from hf_blr.experts import Experts, ExpertsLinear, dense_layers, expanded, layer_named, opened
from hf_blr.factorize import factorize
from hf_blr.finetune import mark_only_factors_trainable
from hf_blr.integration import blr_modules, lora_targets
from hf_blr.plan import resolve_plan
from hf_blr.targets import find_targets

CONFIG = BLRConfig("low_rank", ratio=0.5)


MODELS = {f.__name__: f for f in (tiny_mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek_v3, gpt_oss, llama4)}
each = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def biased(model):
    """With random biases of experts: one that is dropped shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):
            parameter.data.normal_(generator=generator)
    return model


@each
def test_nearly_all_weights_are_reached(make):
    model = make()
    reached = sum(layer.weight.numel() for layer in (layer_named(model, name) for name in find_targets(model)))
    embedding = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert reached >= 0.95 * sum(p.numel() for p in model.parameters() if id(p) not in embedding)
    assert sum(layer.experts > 0 for layer in resolve_plan(model, CONFIG).values()) >= 2


@each
def test_opened_and_closed_the_model_is_as_it_was(make):
    model = biased(make())
    kinds = {name: type(module) for name, module in model.named_modules()}
    before, values = tiny_logits(model), {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    with opened(model, find_targets(model)):
        assert any(isinstance(module, Experts) for module in model.modules())
        torch.testing.assert_close(tiny_logits(model), before, rtol=1e-5, atol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = dict(model.named_parameters())
    assert after.keys() == values.keys()
    assert all(id(after[name]) == where and torch.equal(after[name], value) for name, (where, value) in values.items())


@each
def test_each_expert_is_fitted_saved_loaded_and_made_dense_again(make, tmp_path):
    dense, model = biased(make()), biased(make())
    compress(model, CONFIG, progress=False)
    experts = {name: module for name, module in blr_modules(model).items() if isinstance(module, ExpertsLinear)}
    assert len(experts) >= 2
    for name, module in experts.items():
        weight = layer_named(dense, name).weight
        assert module.u.shape == (len(weight), weight.shape[1], module.spec.rank)
        for expert, matrix in enumerate(weight):
            wanted = factorize(matrix, module.spec).tensors
            torch.testing.assert_close(module.dense_weight()[expert], wanted["u"] @ wanted["v"], rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "factors")
    loaded = type(model).from_pretrained(tmp_path / "factors")
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    back = to_dense(copy.deepcopy(model))
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    torch.testing.assert_close(tiny_logits(back), tiny_logits(model), rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    streamed = type(model).from_pretrained(tmp_path / "dense", blr_config=CONFIG)
    torch.testing.assert_close(tiny_logits(streamed), tiny_logits(model), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_without_some_factors_is_refused(tmp_path):
    model = tiny_mixtral()
    compress(model, CONFIG, progress=False)
    name = "model.layers.1.mlp.experts.down_proj.v"
    state = {key: value for key, value in model.state_dict().items() if key != name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="experts.down_proj.v"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("structure", ["low_rank", "blast", "pivoted"])
def test_factors_train(structure):
    model = tiny_mixtral()
    compress(model, BLRConfig(structure, ratio=0.6, fit_rounds=2), progress=False)
    mark_only_factors_trainable(model)
    model.train()
    model(**tiny_inputs(model))[0].square().mean().backward()
    module = blr_modules(model)["model.layers.0.mlp.experts.gate_up_proj"]
    assert all(factor.grad.abs().sum() > 0 for factor in module.factors().values())


def routed_statistics(model, name, batches):
    """{expert: Gram matrix of the tokens that the router sent it} from plain forwards."""
    with opened(model, [name]):
        return plain_grams(model, list(expanded(model, [name])), batches)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_expert_is_fitted_to_its_own_tokens_and_a_share_of_all(sequential, monkeypatch):
    model, seen = qwen3_moe(), {}
    batches, name = batches_for(model), "model.layers.0.mlp.experts.down_proj"
    own = routed_statistics(model, name, batches)
    original = replace.fit_layer

    def spy(model, layer, plan, problem, *rest):
        seen[layer] = problem
        return original(model, layer, plan, problem, *rest)

    monkeypatch.setattr(replace, "fit_layer", spy)
    config = BLRConfig("low_rank", ratio=0.5, sequential=sequential)
    compress(copy.deepcopy(model), config, calibration=batches, progress=False)
    tokens = 2 * sum(batch["input_ids"].numel() for batch in batches)
    share = sum(own.values()) * (48 / tokens)
    assert len(own) == 6
    for expert, gram in own.items():
        torch.testing.assert_close(seen[expert].gram.double(), gram + share, rtol=1e-4, atol=1e-4)
    assert sum(seen[expert].rows for expert in own) == tokens + 6 * 48


def test_an_expert_without_a_token_is_fitted_to_those_of_the_others():
    grams = {"a.0": Problem(torch.eye(2) * 6, rows=3), "b": Problem(torch.eye(3), rows=1)}
    found = pooled(grams, ["a.0", "a.1", "c.0"])
    assert found["b"] is grams["b"] and "c.0" not in found
    torch.testing.assert_close(found["a.1"].gram, torch.eye(2) * 4)
    torch.testing.assert_close(found["a.0"].gram, torch.eye(2) * 10)
    assert (found["a.0"].rows, found["a.1"].rows) == (5, 2)


def test_fits_to_activations_are_closer_on_them():
    dense, batches, found = qwen3_moe(), batches_for(qwen3_moe()), {}
    for how, given in {"weights": None, "activations": batches}.items():
        model = copy.deepcopy(dense)
        config = BLRConfig("low_rank", ratio=0.5, allocation="uniform", target_modules=["gate_up_proj", "down_proj"])
        compress(model, config, calibration=given, progress=False)
        found[how] = divergence(dense, model, batches)
    assert found["activations"] < 0.9 * found["weights"]


def test_statistics_of_a_tensor_are_those_of_its_experts_together():
    model, name = qwen3_moe(), "model.layers.1.mlp.experts.gate_up_proj"
    batches = batches_for(model)
    own = routed_statistics(model, name, batches)
    for fisher in (True, False):
        config = BLRConfig("low_rank", ratio=0.5, fisher=fisher)
        statistics = collect_statistics(model, config, calibration=batches)
        torch.testing.assert_close(statistics.grams[name].double(), sum(own.values()), rtol=1e-4, atol=1e-4)
        assert statistics.rows_of(name) == 2 * statistics.tokens == sum(statistics.rows[each] for each in own)
        assert not statistics.unreached and (name in statistics.output_grams) == fisher
    assert type(model.model.layers[1].mlp.experts) is not Experts


def test_experts_that_are_handed_every_token_are_fitted_to_those_that_chose_them():
    model, name = llama4(), "model.layers.1.feed_forward.experts.gate_up_proj"
    statistics = collect_statistics(model, CONFIG, calibration=batches_for(model))
    assert statistics.rows_of(name) == statistics.tokens
    assert statistics.rows_of(name) == sum(statistics.rows.get(f"{name}.{expert}", 0) for expert in range(4))
    compress(model, CONFIG, progress=False)
    eager = tiny_logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**tiny_inputs(model), use_cache=False).logits, eager, rtol=1e-4, atol=1e-4)


def test_a_budget_counts_all_experts_and_gives_more_to_what_the_loss_feels():
    model, config = qwen3_moe(), BLRConfig("low_rank", ratio=0.5, allocation="loss")
    with torch.no_grad():
        # so small that nothing is lost by giving it away
        model.model.layers[1].mlp.experts.down_proj *= 1e-3
    statistics = collect_statistics(model, config, calibration=batches_for(model))
    plan, dense = resolve_plan(model, config), {}
    for name, layer in plan.items():
        dense[name] = layer.matrices * layer.spec.dense_parameters
    chosen, loss = share_budget(model, plan, statistics, config)
    kept = {name: layer.matrices * layer.spec.num_parameters for name, layer in chosen.items()}
    total = sum(kept.get(name, size) for name, size in dense.items())
    assert 0.47 * sum(dense.values()) < total <= 0.5 * sum(dense.values()) and loss > 0
    small, large = (f"model.layers.{i}.mlp.experts.down_proj" for i in (1, 0))
    assert kept[small] < 0.15 * dense[small] and kept.get(large, dense[large]) > 0.3 * dense[large]
    report = compress(model, config, statistics=statistics, progress=False)
    assert report.ratio == pytest.approx(total / sum(dense.values()))
    assert blr_modules(model)[small].spec == chosen[small].spec


def test_the_predicted_loss_of_experts_is_that_of_each_on_its_share():
    model, name = qwen3_moe(), "model.layers.0.mlp.experts.down_proj"
    statistics = collect_statistics(model, CONFIG, calibration=batches_for(model))
    layer = Layer(model, name, statistics, CONFIG)
    gram, output_gram = statistics.grams[name], statistics.output_grams[name]
    rows = [statistics.rows[f"{name}.{expert}"] for expert in range(6)]
    wanted = sum(
        count / sum(rows) * loss_curve(weight, gram, output_gram, statistics.pairs(name), layer.options.damping)
        for count, weight in zip(rows, layer_named(model, name).weight, strict=True)
    )
    assert layer.curve() == pytest.approx(wanted.tolist())


def test_stopped_in_the_middle_of_a_tensor_it_is_dense_again(monkeypatch, tmp_path):
    model, original, count = tiny_mixtral(), replace.fit_layer, []

    def stop(*args):
        count.append(args)
        if len(count) == 10:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(replace, "fit_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(model, CONFIG, progress=False)
    # four projections and the first tensor; of the second one expert
    assert len(blr_modules(model)) == 5
    assert type(model.model.layers[0].mlp.experts.down_proj) is torch.nn.Parameter
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_logits(type(model).from_pretrained(tmp_path)), tiny_logits(model))


def test_inspect_counts_every_expert(tmp_path, capsys):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "dense")
    assert main(["inspect", str(tmp_path / "dense"), "--json", str(tmp_path / "d.json")]) == 0
    rows = {row["layers"]: row for row in json.loads((tmp_path / "d.json").read_text())["rows"]}
    assert rows["8 x gate_up_proj"]["parameters (M)"] == pytest.approx(8 * 64 * 192 / 1e6)
    compress(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path / "factors")
    assert main(["inspect", str(tmp_path / "factors"), "--json", str(tmp_path / "f.json")]) == 0
    rows = {row["layers"]: row for row in json.loads((tmp_path / "f.json").read_text())["rows"]}
    rank = blr_modules(model)["model.layers.0.mlp.experts.gate_up_proj"].spec.rank
    assert rows["2 x gate_up_proj"]["parameters (M)"] == pytest.approx(8 * rank * (64 + 192) / 1e6)
    total = sum(module.num_parameters for module in blr_modules(model).values())
    assert f"hold {total / 1e6:.1f} M" in capsys.readouterr().out


def test_adapters_on_experts_are_refused():
    peft = pytest.importorskip("peft")
    model = tiny_mixtral()
    compress(model, CONFIG, progress=False)
    with pytest.raises(NotImplementedError, match="factors of experts take no LoRA adapter"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))


def test_what_knows_linear_layers_alone_leaves_experts_alone():
    model = tiny_mixtral()
    compress(model, CONFIG, progress=False)
    assert not any("experts" in name for name in lora_targets(model))
    before = tiny_logits(model)
    assert not any("experts" in name for group in fuse(model) for name in group)
    torch.testing.assert_close(tiny_logits(model), before, rtol=1e-4, atol=1e-4)


def test_experts_are_named_like_other_layers():
    model = tiny_mixtral()
    plan = resolve_plan(model, BLRConfig("low_rank", ratio=0.5, modules_to_not_convert=["down_proj"]))
    assert sum("experts" in name for name in plan) == 2
    report = compress(model, BLRConfig("low_rank", ratio=0.5, target_modules=["experts.down_proj"]), progress=False)
    assert len(report.layers) == 8 and len(blr_modules(model)) == 2
    assert type(model.model.layers[0].mlp.experts.gate_up_proj) is torch.nn.Parameter
    assert "model.layers.0.mlp.experts.gate_up_proj" in dense_layers(model)


def test_a_plan_of_the_command_line_treats_a_tensor_as_one_layer(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A line about one thing, then a line about another. " * 60)
    tiny_mixtral(max_position_embeddings=64).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    common = [str(tmp_path / "dense"), "--structure", "low_rank", "--dataset", str(text), "--seqlen", "32"]
    common += ["--num-samples", "8"]
    plan = tmp_path / "plan.json"
    assert main(["plan", common[0], str(plan), *common[1:], "--ratio", "0.5"]) == 0
    layers = json.loads(plan.read_text())["layers"]
    assert {layer["experts"] for name, layer in layers.items() if "experts" in name} == {4}
    assert main(["compress", common[0], str(tmp_path / "out"), *common[1:], "--plan", str(plan)]) == 0
    fitted = 4 * sum(name.endswith("gate_up_proj") for name in layers)
    assert f"{fitted} x gate_up_proj" in capsys.readouterr().out
    loaded = type(tiny_mixtral()).from_pretrained(tmp_path / "out")
    assert {name: module.spec.rank for name, module in blr_modules(loaded).items()} == {
        name: layer["rank"] for name, layer in layers.items()
    }


def test_a_ratio_buys_rows_that_products_of_many_experts_take():
    def ranks(**config):
        plan = resolve_plan(tiny_mixtral(), BLRConfig("low_rank", **config))
        return {layer.spec.rank for name, layer in plan.items() if name.endswith("down_proj")}

    # 19 of 96 -> 64 features; below 8 no such rank is near, and a named rank is what it is
    assert ranks(ratio=0.5) == {16}
    assert ranks(ratio=0.2) == {7}
    assert ranks(rank=19) == {19}
