"""Layers of zeros, of very large and of very small numbers: fitted right or refused by name; and what is reported."""

import pytest
import torch
from tiny import batches_for, tiny_llama
from torch import nn

from hf_blr import BLRConfig, compress
from hf_blr.factorize import factorize, relative_error
from hf_blr.linear import blr_modules
from hf_blr.ops.table import implementation_of
from hf_blr.structures import make_spec, structures

#: of how a model is fitted
KINDS = {
    "sequential": dict(fisher=False),
    "whole": dict(),
    "blockwise": dict(sequential=False, fisher=False),
    "auto": dict(structure="auto"),
    "refined": dict(block_steps=3, allocation="uniform"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_behind_a_zero_norm_are_fitted_to_their_weights(kind, caplog):
    model = tiny_llama()
    model.model.layers[1].post_attention_layernorm.weight.data.zero_()
    wanted = tiny_llama().model.layers[1].mlp.up_proj.weight
    config = BLRConfig(**{"structure": "low_rank", "ratio": 0.6, **KINDS[kind]})
    report = compress(model, config, calibration=batches_for(model), progress=False)
    warnings = [r.getMessage() for r in caplog.records if "or zeros alone" in r.getMessage()]
    assert len(warnings) == 1
    assert all(f"layers.1.mlp.{name}_proj" in warnings[0] for name in ("gate", "up", "down"))
    layer = next(entry for entry in report.layers if entry.name == "model.layers.1.mlp.up_proj")
    fitted = blr_modules(model)[layer.name].dense_weight()
    assert layer.rel_error == pytest.approx(relative_error(wanted, fitted), rel=1e-4)
    assert layer.rel_error == pytest.approx(factorize(wanted, layer.spec).rel_error, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_mlp_stays_zero(kind):
    model = tiny_llama()
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.data.zero_()
    config = BLRConfig(**{"structure": "low_rank", "ratio": 0.6, **KINDS[kind]})
    report = compress(model, config, calibration=batches_for(model), progress=False)
    pruned = {name: module for name, module in blr_modules(model).items() if ".1.mlp." in name}
    assert len(pruned) == 3 and not any(module.dense_weight().any() for module in pruned.values())
    assert all(layer.rel_error == 0 for layer in report.layers if layer.name in pruned)


@pytest.mark.parametrize("structure", structures())
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_a_weight_changes_nothing_else(structure, scale):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    spec = make_spec(structure, 64, 48, ratio=0.6, num_blocks=2 if structures()[structure].spec.blocked else None)
    plain, scaled = factorize(weight, spec), factorize(weight * scale, spec)
    assert scaled.rel_error == pytest.approx(plain.rel_error, rel=1e-3)
    assert all(torch.isfinite(t).all() for t in scaled.tensors.values())


def test_a_fit_that_its_dtype_cannot_hold_is_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).double()
    # each number is one of float64, but the fit's factors are of float32
    model[1].weight.data.mul_(1e300)
    dense = model[1]
    with pytest.raises(ValueError, match="1: the fit's u cannot be stored as .*expected finite numbers"):
        compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    assert model[1] is dense and list(blr_modules(model)) == ["0"]


@pytest.mark.parametrize("structure", structures())
def test_the_error_reported_is_that_of_what_is_stored(structure):
    generator = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)).bfloat16(), torch.randn(40, 64, generator=generator).bfloat16()
    weight = model[0].weight.detach().float()
    blocks = 2 if structures()[structure].spec.blocked else None
    # damping that would double the error if it counted
    config = BLRConfig(structure, ratio=0.9, num_blocks=blocks, target_modules=["0"], damping=0.9, fisher=False)
    report = compress(model, config, calibration=[{"input": x}], progress=False)
    module = blr_modules(model)["0"]
    wide = {name: t.detach().float() if t.is_floating_point() else t for name, t in module.tensors().items()}
    lost = (weight - implementation_of(structure).dense(**wide)) @ x.float().T
    assert report.layers[0].rel_error == pytest.approx((lost.norm() / (weight @ x.float().T).norm()).item(), rel=1e-3)


def test_a_budget_that_buys_nothing_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(ValueError, match="best spent on all 14 layers as they are"):
        compress(model, BLRConfig(ratio=1.0), calibration=batches_for(model), progress=False)
    assert not blr_modules(model) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("key, value", [("bias", True), ("transposed", True)])
def test_a_plan_of_another_kind_of_layer_is_refused(key, value):
    model = tiny_llama()
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    layers = model.config.quantization_config.layers
    layers["model.layers.1.mlp.down_proj"][key] = value
    dense = tiny_llama()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: the plan says .*, the model has a linear layer"):
        compress(dense, BLRConfig(layers=layers), progress=False)
    assert not blr_modules(dense)
