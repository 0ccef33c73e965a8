"""Tensors of experts in budgets of bits and of time: their options, what is stored, what it is predicted to cost."""

import copy
import json
import re
from functools import cache

import pytest
import torch
from expert_cases import qwen3_moe
from tiny import batches_for, divergence, tiny_logits, tiny_mixtral, tiny_tokenizer

from hf_blr import BLRConfig, collect_statistics, compress, to_dense
from hf_blr.cli import main
from hf_blr.compression.bits import formats_of, options_of
from hf_blr.compression.budget import share_budget
from hf_blr.compression.layer_trials import Layer
from hf_blr.compression.rounding_trials import trials_of
from hf_blr.experts import layer_named
from hf_blr.factorize import factorize
from hf_blr.formats import PLAIN, format_named
from hf_blr.linear import blr_modules
from hf_blr.plan import plan_from_layers, resolve_plan
from hf_blr.roofline.devices import DEVICES
from hf_blr.roofline.experts import predict_experts
from hf_blr.roofline.stages import predict
from hf_blr.structures import Dense, LowRank

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIG = BLRConfig("auto", bits_per_weight=3.5, fit_rounds=2, target_modules=EXPERTS)


@cache
def statistics(make):
    return collect_statistics(make(), CONFIG, calibration=batches_for(make()))


@pytest.mark.parametrize("make", [tiny_mixtral, qwen3_moe])
def test_bits_of_experts_are_shared_out_stored_loaded_and_made_dense(make, tmp_path):
    dense, model = make(), make()
    config = BLRConfig("auto", bits_per_weight=3.5, fit_rounds=2, target_modules=["q_proj", *EXPERTS])
    report = compress(model, config, calibration=batches_for(model), progress=False)
    modules = blr_modules(model)
    assert {name.rpartition("mlp.")[2] for name in modules if "experts" in name} == set(EXPERTS)
    sizes = {name: layer.matrices * layer.spec.dense_parameters for name, layer in resolve_plan(dense, config).items()}
    stored = sum(t.numel() * t.element_size() for module in modules.values() for t in module.state_dict().values())
    left = 4 * sum(size for name, size in sizes.items() if name not in modules)
    assert 0.85 * 3.5 < 8 * (stored + left) / sum(sizes.values()) <= 3.5
    for layer in report.layers:
        tensor = layer.name.rpartition(".")[0] if layer.name not in modules else layer.name
        held = sum(t.numel() * t.element_size() for t in modules[tensor].state_dict().values())
        assert layer.choice.bits == pytest.approx(8 * held / sizes[tensor])
        assert layer.choice.taken.split()[-1] == modules[tensor].storage.name
    assert divergence(dense, model, batches_for(dense)) < 0.5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    torch.testing.assert_close(tiny_logits(to_dense(copy.deepcopy(model))), tiny_logits(model), rtol=1e-3, atol=1e-3)


def test_experts_have_the_options_of_layers_and_their_bits_are_those_of_all():
    plan = resolve_plan(qwen3_moe(), CONFIG)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    layer, formats = Layer(qwen3_moe(), name, statistics(qwen3_moe), CONFIG), formats_of(CONFIG)
    whole = plan[name].spec
    trials = trials_of({name: layer}, {name: whole}, formats)[layer.kind]
    options = options_of(layer, whole, trials, formats, torch.float32, CONFIG)
    kinds = {option.kind for option in options}
    assert {("dense", "plain"), ("dense", "int3"), ("low_rank", "int4"), ("pivoted", "fp8")} <= kinds
    assert {("monarch", "4x4", "int4"), ("blast", "4x16", "int8"), ("low_rank", "plain")} <= kinds
    for option in options[::7]:
        tensors = option.storage.stored(option.spec or whole, (6,)).values()
        expected = sum(
            shape.numel() * option.storage.dtype_of(kind, torch.float32).itemsize
            for shape, kind in ((torch.Size(shape), kind) for shape, kind in tensors)
        )
        assert option.cost == 8 * expected


@pytest.mark.parametrize("storage", ["int4", "int2", "fp8"])
def test_the_predicted_loss_is_that_of_each_expert_on_its_share(storage):
    """Of a whole matrix, and of factors, whose trial was on one of the experts."""
    model, formats = qwen3_moe(), formats_of(CONFIG)
    with torch.no_grad():
        for projection in EXPERTS:
            # experts that differ, so that one of them says little of all
            weight = model.get_parameter(f"model.layers.1.mlp.{projection}")
            weight *= torch.linspace(0.3, 3, 6)[:, None, None]
    found, name = (
        collect_statistics(model, CONFIG, calibration=batches_for(model)),
        "model.layers.1.mlp.experts.down_proj",
    )
    layer, tensor = Layer(model, name, found, CONFIG), layer_named(model, name).weight
    n, k = tensor.shape[1:]
    trials = trials_of({name: layer}, {name: Dense.whole(k, n)}, formats)[layer.kind]
    options = options_of(layer, Dense.whole(k, n), trials, formats, torch.float32, CONFIG)
    gram, output_gram = layer.grams(tensor.device)
    rows = [found.rows[f"{name}.{expert}"] for expert in range(6)]
    assert layer.tried().expert == rows.index(max(rows))
    for spec in (Dense.whole(k, n), LowRank(k, n, 16)):
        option = next(o for o in options if o.spec == spec and o.storage.name == storage)
        measured = 0.0
        for count, weight in zip(rows, tensor.detach(), strict=True):
            fitted = factorize(weight, spec, gram, output_gram, layer.options, format_named(storage))
            change = fitted.matrix(spec) - weight
            image = torch.block_diag(*output_gram) @ change @ gram
            measured += count / sum(rows) * ((image * change).sum() / (2 * found.pairs(name))).item()
        assert 0.6 < option.loss / measured < 1.6, spec


def test_a_budget_of_parameters_tries_structures_of_experts_too():
    config = BLRConfig("auto", ratio=0.5, fit_rounds=2, target_modules=EXPERTS)
    plan, _ = share_budget(qwen3_moe(), resolve_plan(qwen3_moe(), config), statistics(qwen3_moe), config)
    single = {}
    for structure in ("low_rank", "monarch"):
        alone = BLRConfig(structure, ratio=0.5, allocation="loss", target_modules=EXPERTS)
        single[structure] = share_budget(qwen3_moe(), resolve_plan(qwen3_moe(), alone), statistics(qwen3_moe), alone)[1]
    chosen = {layer.spec.structure for layer in plan.values()}
    assert chosen - {"low_rank"} and all(layer.experts == 6 for layer in plan.values())
    assert _ <= min(single.values())


def test_time_of_experts_is_that_of_those_that_are_chosen():
    device, spec = DEVICES["H100"], LowRank(2048, 1536, 512)

    def seconds(pairs, experts=128, dense=False):
        return predict_experts(spec, PLAIN, pairs, experts, device, dense)

    # one expert alone is a layer
    assert seconds(1024, 1) == pytest.approx(predict(spec, 1024, device))
    assert seconds(1024, 1, dense=True) == pytest.approx(predict(spec, 1024, device, form="dense"))
    # eight experts of a token are read, not all, and many tokens read each once
    few, many = seconds(8, dense=True), seconds(4096, dense=True)
    assert 3 * predict(spec, 1, device, "dense") < few < 8 * predict(spec, 1, device, "dense")
    assert few < many / 10 and many == pytest.approx(128 * predict(spec, 32, device, "dense"), rel=1e-3)
    int4 = predict_experts(spec, format_named("int4", 128), 8, 128, device)
    assert int4 < 0.6 * seconds(8)


def test_a_plan_of_the_command_line_shares_bits_and_time_over_experts(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A line about one thing, then a line about another. " * 60)
    tiny_mixtral(max_position_embeddings=64).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    common = ["plan", str(tmp_path / "dense"), str(tmp_path / "plan.json"), "--overwrite", "--dataset", str(text)]
    common += ["--seqlen", "32", "--num-samples", "4", "--target-modules", EXPERTS[1], "--tokens", "1"]

    def planned():
        plan = plan_from_layers(json.loads((tmp_path / "plan.json").read_text())["layers"])
        assert all(layer.experts == 4 for layer in plan.values()) and len(plan) == 2
        # each token takes two experts of four
        return sum(predict_experts(layer.spec, layer.storage, 2, 4, DEVICES["H100"]) for layer in plan.values())

    limit = 0.3 * 2 * predict_experts(Dense.whole(96, 64), PLAIN, 2, 4, DEVICES["H100"], dense=True)
    assert main([*common, "--structure", "auto", "--bits-per-weight", "6", "--ms", str(1e3 * limit)]) == 0
    assert 0.7 * limit < planned() <= limit
    assert main([*common, "--structure", "low_rank", "--ms", str(1e3 * limit)]) == 0
    assert 0.7 * limit < planned() <= limit
    # all experts are counted
    said = re.search(r"of (0.\d) M parameters \((\d+\.\d) %\)", capsys.readouterr().out.splitlines()[-2])
    assert said[1] == "0.0" and 20 < float(said[2]) < 60
