"""Passes in evaluation mode give each module its own mode back, parts that were frozen in it included."""

import pytest
import torch
from tiny import tiny_llama, tiny_logits
from torch import nn

from hf_blr import BLRConfig, collect_statistics, compress, perplexity
from hf_blr.calibration.blockwise import iterate_grams
from hf_blr.finetune.refine import statistics_for
from hf_blr.linear import BLRLinear
from hf_blr.modes import evaluating
from hf_blr.structures import LowRank


def half_frozen(**kw):
    """A model in training whose first block, and a projection of the second, are kept in evaluation mode."""
    model = tiny_llama(**kw).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.up_proj.eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 256, (2, 16), generator=generator)} for _ in range(count)]


def test_each_module_gets_its_own_mode_back():
    model = half_frozen()
    before = modes(model)
    assert len(set(before.values())) == 2
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == before


def test_what_takes_a_modules_place_gets_its_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    model[1].eval()
    with evaluating(model):
        model[0], model[1] = nn.Identity().eval(), nn.Identity()
    assert modes(model) == {"": True, "0": True, "1": False}


def test_a_fused_part_that_was_not_in_training_stays_fused():
    """`train` would end what `fuse` began."""
    model = nn.Sequential(BLRLinear.from_spec(LowRank(8, 8, 2))).train()
    model[0].eval().activation = "silu"
    with evaluating(model):
        pass
    assert model[0].activation == "silu"


@pytest.mark.parametrize(
    "settings",
    [{}, {"sequential": False}, {"fisher": False, "sequential": False}, {"block_steps": 2}],
    ids=["sequential", "dense inputs", "no Fisher", "block steps"],
)
@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_compress_keeps_modes(structure, settings):
    model = half_frozen()
    before = modes(model)
    report = compress(model, BLRConfig(structure, ratio=0.5, **settings), calibration=batches(), progress=False)
    assert report.fitted_to == "activations"
    assert sum(isinstance(module, BLRLinear) for module in model.modules()) == len(report.layers)
    assert modes(model) == before


def test_compress_to_the_weights_keeps_modes():
    model = half_frozen()
    before = modes(model)
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    assert modes(model) == before


@pytest.mark.parametrize("fisher", [True, False])
def test_collect_statistics_keeps_modes(fisher):
    model = half_frozen()
    before = modes(model)
    collect_statistics(model, BLRConfig("low_rank", ratio=0.5, fisher=fisher), calibration=batches())
    assert modes(model) == before


def test_grams_given_up_half_way_keep_modes():
    model = half_frozen()
    before = modes(model)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    groups = iterate_grams(model, names, batches())
    next(groups)
    assert not any(modes(model).values())
    groups.close()
    assert modes(model) == before


def test_refinements_look_at_the_model_keeps_modes():
    model = half_frozen()
    compress(model, BLRConfig("pivoted", ratio=0.5), progress=False)
    before = modes(model)
    statistics_for(model, batches()[0]["input_ids"])
    assert modes(model) == before


def test_perplexity_keeps_modes():
    model = half_frozen(attention_dropout=0.5)
    before = modes(model)
    ids = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0))
    first = perplexity(model, None, ids, seqlen=16).nll_sum
    assert modes(model) == before
    assert perplexity(model, None, ids, seqlen=16).nll_sum == first


def test_a_frozen_block_computes_after_compression_what_it_did_before():
    """What the modes are for: dropout of a frozen block would come alive."""
    model = half_frozen(attention_dropout=0.5)
    model.model.layers[1].eval()
    compress(model, BLRConfig("low_rank", ratio=0.5), calibration=batches(), progress=False)
    assert torch.equal(tiny_logits(model), tiny_logits(model))
