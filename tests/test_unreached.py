"""Layers that no calibration input, or no gradient, reaches: fitted to their weights, at the config's ratio."""

import copy
import logging

import pytest
import torch
from tiny import batches_for, build, tiny_llama, tiny_llava
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
)
from zoo_inputs import plain_grams
from zoo_models import build as build_model

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.compression.budget import share_budget
from hf_blr.dense import dense_weight
from hf_blr.factorize import factorize
from hf_blr.plan import resolve_plan

CONFIG = BLRConfig("low_rank", ratio=0.6)


def text():
    return [{"input_ids": torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(0))}] * 2


@pytest.mark.parametrize("how", ["shared", "uniform", "without fisher", "statistics", "both"])
def test_text_for_a_vision_language_model_fits_the_vision_tower_to_its_weights(how, caplog):
    dense = tiny_llava()
    model = copy.deepcopy(dense)
    config, given = CONFIG, {"calibration": text()}
    if how == "uniform":
        config = BLRConfig("low_rank", ratio=0.6, allocation="uniform")
    elif how == "without fisher":
        config = BLRConfig("low_rank", ratio=0.6, fisher=False)
    elif how in ("statistics", "both"):
        statistics = collect_statistics(dense, config, calibration=text())
        given = {"statistics": statistics} | (given if how == "both" else {})
    with caplog.at_level(logging.WARNING):
        report = compress(model, config, progress=False, **given)
    assert sum("no calibration input reached" in record.getMessage() for record in caplog.records) == 1
    plan, tower = resolve_plan(dense, config), [layer for layer in report.layers if "vision_tower" in layer.name]
    assert len(tower) == 12
    assert len(report.layers) + len(report.left_dense) == 12 + 14
    for layer in tower:
        assert layer.spec == plan[layer.name].spec
        alone = factorize(dense_weight(dense.get_submodule(layer.name)), layer.spec)
        assert layer.rel_error == pytest.approx(alone.rel_error, rel=1e-3)


def test_what_no_input_reached_does_not_keep_the_rest_from_a_sequential_fit(caplog):
    with caplog.at_level(logging.WARNING):
        compress(tiny_llava(), CONFIG, calibration=text(), progress=False)
    assert "fitted on the dense model's inputs" not in caplog.text


@pytest.mark.parametrize("gradient", ["zero", "none"])
def test_layers_that_no_gradient_reaches_keep_the_ratio(gradient):
    model = tiny_llama()
    plan = resolve_plan(model, CONFIG)
    statistics = collect_statistics(model, CONFIG, calibration=batches_for(model))
    name = "model.layers.1.mlp.down_proj"
    if gradient == "zero":
        statistics.output_grams[name].zero_()
    else:
        del statistics.output_grams[name]
    chosen, _ = share_budget(model, plan, statistics, CONFIG)
    assert chosen[name] == plan[name]
    report = compress(model, CONFIG, statistics=statistics, progress=False)
    assert {layer.name: layer.spec for layer in report.layers}[name] == plan[name].spec


def one_label(**more):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, num_labels=1, pad_token_id=0, initializer_range=0.1, **sizes, **more)
    return build(LlamaForSequenceClassification, config)


@pytest.mark.parametrize("structure", ["low_rank", "auto"])
def test_a_head_of_one_number_is_weighed_by_what_it_moves(structure, caplog):
    config = BLRConfig(structure, ratio=0.6, allocation="loss")
    report = compress(one_label(), config, calibration=text(), progress=False)
    assert len(report.layers) + len(report.left_dense) == 14 and report.predicted_loss > 0
    kept = sum(layer.spec.num_parameters for layer in report.layers) + sum(report.left_dense.values())
    dense = sum(layer.spec.dense_parameters for layer in report.layers) + sum(report.left_dense.values())
    assert kept == pytest.approx(0.6 * dense, rel=0.05)
    assert not caplog.text


class Silent(torch.nn.Module):
    """Its output depends on none of its layers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64)])

    def forward(self, x):
        self.layers[0](x)
        return x


def test_what_moves_no_output_has_no_loss_to_share_a_budget_by(caplog):
    given = {"calibration": [{"x": torch.randn(2, 5, 64)}], "progress": False}
    report = compress(Silent(), CONFIG, **given)
    assert len(report.layers) == 1 and report.predicted_loss is None
    assert "no gradient reaches the layers of Silent" in caplog.text
    assert "all outputs weigh alike and all layers keep the same ratio" in caplog.text
    for wanted, message in (({"allocation": "loss"}, "no gradient reaches"), ({"structure": "auto"}, "auto")):
        model = Silent()
        with pytest.raises(ValueError, match=message):
            compress(model, BLRConfig(**{"structure": "low_rank", "ratio": 0.6, **wanted}), **given)
        assert isinstance(model.layers[0], torch.nn.Linear)


class Mixture(torch.nn.Module):
    """A residual block whose tokens go to one of three experts, never to the last."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(32, 2)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)) for _ in range(3)
        )

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, out = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().flatten()
            out.index_add_(0, rows, self.experts[number](flat[rows]))
        return x + out.view_as(x)


class Mixtures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("sequential", [True, False])
def test_experts_that_no_token_chose_are_fitted_to_their_weights(sequential, caplog):
    torch.manual_seed(0)
    model = Mixtures()
    names = [f"layers.{i}.experts.{j}.{k}" for i in (0, 1) for j in range(3) for k in (0, 2)]
    batches = [{"x": torch.randn(2, 50, 32)} for _ in range(3)]
    right = plain_grams(model, names, batches)
    statistics = collect_statistics(model, CONFIG, calibration=batches)
    assert statistics.unreached == {name for name in names if ".experts.2." in name} == set(names) - set(right)
    for name, gram in right.items():
        torch.testing.assert_close(statistics.grams[name].double(), gram, rtol=1e-5, atol=1e-3)
    config = BLRConfig("low_rank", ratio=0.6, sequential=sequential)
    report = compress(model, config, calibration=batches, progress=False)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "no calibration input reached layers.0.experts.2.0" in warnings[0]
    plan = resolve_plan(Mixtures(), CONFIG)
    untold = {layer.name: layer.spec for layer in report.layers if ".experts.2." in layer.name}
    assert untold == {name: plan[name].spec for name in statistics.unreached}


def test_layers_whose_weight_alone_is_read_are_fitted_to_it(caplog):
    model = build_model("mamba")
    report = compress(model, CONFIG, calibration=text(), progress=False)
    assert {layer.spec.ratio <= 0.6 for layer in report.layers if layer.name.endswith("dt_proj")} == {True}
    assert sum("no calibration input reached" in record.getMessage() for record in caplog.records) == 1
