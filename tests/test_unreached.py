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
    assert "no plain chain of blocks" not in caplog.text


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


def test_a_head_of_one_class_has_no_loss_to_share_a_budget_by(caplog):
    report = compress(one_label(), CONFIG, calibration=text(), progress=False)
    assert len(report.layers) == 14 and report.predicted_loss is None
    assert all(0.5 < layer.spec.ratio <= 0.6 for layer in report.layers)
    assert "no gradient reaches the layers of LlamaForSequenceClassification" in caplog.text
    assert "all outputs weigh alike and all layers keep the same ratio" in caplog.text


@pytest.mark.parametrize("wanted", ["loss", "auto"])
def test_what_needs_a_loss_refuses_a_head_of_one_class(wanted):
    model = one_label()
    config = BLRConfig("auto", ratio=0.6) if wanted == "auto" else BLRConfig(ratio=0.6, allocation="loss")
    with pytest.raises(ValueError, match="no gradient reaches" if wanted == "loss" else "logits of several classes"):
        compress(model, config, calibration=text(), progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
