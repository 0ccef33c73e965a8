"""Which layers become what."""

import pytest
import torch
from tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from torch import nn
from transformers import XLNetConfig, XLNetLMHeadModel

from hf_blr import BLRConfig
from hf_blr.plan import layers_from_plan, plan_from_layers, resolve_plan
from hf_blr.structures import Blast, LowRank
from hf_blr.targets import find_targets, match


@pytest.mark.parametrize(
    "build, count, untouched",
    [
        (tiny_llama, 14, "lm_head"),
        (tiny_gpt2, 8, "lm_head"),
        (tiny_bert, 12, "classifier"),
        (tiny_vit, 12, "classifier"),
    ],
)
def test_default_targets_are_the_projections_of_the_blocks(build, count, untouched):
    targets = find_targets(build())
    assert len(targets) == count
    assert not [name for name in targets if untouched in name or "pooler" in name]


def test_routers_heads_tied_and_fp32_layers_stay_out_by_default():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.wo, self.tied = (nn.Linear(4, 17) for _ in range(4))
            self.between = nn.Linear(4, 16)
            # a router of several parts, as Gemma 4 and Granite have it
            self.router = nn.ModuleDict({"norm": nn.LayerNorm(4), "proj": nn.Linear(4, 17)})

    class Model(nn.Module):
        _keep_in_fp32_modules = ["wo"]

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])
            self.embed = nn.Embedding(17, 4)
            self.blocks[0].tied.weight = self.embed.weight
            self.heads = nn.ModuleList(nn.Linear(4, 17) for _ in range(2))

        def get_output_embeddings(self):
            return self.heads

    model = Model()
    assert find_targets(model) == ["blocks.0.up"]
    assert find_targets(model, ["router.proj"]) == ["blocks.0.router.proj"]
    with pytest.raises(ValueError, match=r"blocks.0.tied shares its weight"):
        find_targets(model, ["tied"])


def test_patterns_follow_peft():
    names = ["a.0.q_proj", "a.0.xq_proj", "a.10.q_proj", "q_proj"]
    assert match(["q_proj"], names, "t") == {"a.0.q_proj", "a.10.q_proj", "q_proj"}
    assert match(["0.q_proj"], names, "t") == {"a.0.q_proj"}
    assert match(r"a\.\d+\.q_proj", names, "t") == {"a.0.q_proj", "a.10.q_proj"}
    assert match(r"q_proj", names, "t") == {"q_proj"}
    with pytest.raises(ValueError, match=r"t \['nothing'\] match no linear layer.*q_proj"):
        match(["q_proj", "nothing"], names, "t")


def test_exclusion_wins_and_nothing_left_is_an_error():
    model = tiny_llama()
    kept = find_targets(model, None, ["layers.0.self_attn.q_proj", "down_proj"])
    assert len(kept) == 11 and "model.layers.1.self_attn.q_proj" in kept
    with pytest.raises(ValueError, match="no module of LlamaForCausalLM is left"):
        find_targets(model, ["q_proj"], ["q_proj"])


def test_patterns_that_match_no_layer_are_named(caplog):
    dense = {"modules_to_not_convert": ["qproj", "o_proj", "lm_head"]}
    config = BLRConfig("low_rank", ratio=0.5, overrides={"kproj": {"rank": 2}, "up_proj": {"rank": 4}}, **dense)
    assert len(resolve_plan(tiny_llama(), config)) == 12  # lm_head is no target, and a layer all the same
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("q_proj" in each for each in said)
    assert "overrides of BLRConfig has patterns that match no layer: ['kproj']" in said[0]
    assert "modules_to_not_convert of BLRConfig has patterns that match no layer: ['qproj']" in said[1]


def test_layers_outside_of_blocks_are_to_be_named():
    block = tiny_llama().model.layers[0]
    with pytest.raises(ValueError, match="those inside of repeated blocks are taken where none are named; name yours"):
        resolve_plan(block, BLRConfig("low_rank", ratio=0.5))
    assert list(resolve_plan(block, BLRConfig("low_rank", ratio=0.5, target_modules=["up_proj"]))) == ["mlp.up_proj"]


def test_overrides_apply_to_the_first_match():
    config = BLRConfig(
        ratio=0.5,
        num_blocks=4,
        overrides={r"0\.mlp\..*": {"structure": "low_rank", "rank": 3}, "up_proj": {"ratio": 0.8}},
    )
    plan = resolve_plan(tiny_llama(), config)
    assert plan["model.layers.0.mlp.up_proj"].spec == LowRank(64, 96, 3)
    assert 0.7 < plan["model.layers.1.mlp.up_proj"].spec.ratio <= 0.8
    assert isinstance(plan["model.layers.1.mlp.gate_proj"].spec, Blast)
    assert plan_from_layers(layers_from_plan(plan)) == plan


@pytest.mark.parametrize(
    "structure, blocks, multiple, step", [("low_rank", None, 8, 8), ("monarch", 4, 8, 2), ("blast", 4, 8, 8)]
)
def test_ranks_are_cut_to_multiples(structure, blocks, multiple, step):
    model, sizes = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 24)), {"ratio": 0.6, "num_blocks": blocks}
    config = BLRConfig(structure, rank_multiple=multiple, target_modules=["0", "1"], **sizes)
    wide, narrow = resolve_plan(model, config).values()
    before, same = resolve_plan(model, BLRConfig(structure, target_modules=["0", "1"], **sizes)).values()
    assert before.spec.rank % step
    assert wide.spec.rank == before.spec.rank // step * step
    # more than a sixteenth would be given for it
    assert structure == "monarch" or narrow.spec.rank == same.spec.rank


def test_conv1d_is_planned_in_out_in_order():
    layer = resolve_plan(tiny_gpt2(), BLRConfig("low_rank", ratio=0.5))["transformer.h.0.attn.c_attn"]
    assert (layer.spec.in_features, layer.spec.out_features) == (64, 192)
    assert layer.transposed and layer.bias


def test_a_fixed_rank_leaves_layers_dense_that_it_would_not_shrink(caplog):
    model = tiny_llama()
    plan = resolve_plan(model, BLRConfig("low_rank", rank=30))
    assert not [name for name in plan if "k_proj" in name or "v_proj" in name]
    assert "4 modules stay dense" in caplog.text
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj: .*nothing is saved.*at most 21"):
        resolve_plan(model, BLRConfig("low_rank", rank=30, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match="rank=900 makes no module"):
        resolve_plan(model, BLRConfig("low_rank", rank=900))


@pytest.mark.parametrize(
    "config, message",
    [
        (
            BLRConfig(ratio=0.5, num_blocks=(4, 7)),
            r"model.layers.0.self_attn.q_proj: out_features 64 .*7 blocks; choose from \[1, 2",
        ),
        (BLRConfig("low_rank", ratio=1.0), r"q_proj: .*nothing is saved"),
        (BLRConfig(ratio=0.001), r"q_proj: ratio=0.001 .*at least"),
        (BLRConfig(ratio=0.5, target_modules=["query"]), r"\['query'\] match no linear layer.*q_proj"),
    ],
)
def test_errors_start_with_the_module(config, message):
    with pytest.raises(ValueError, match=message):
        resolve_plan(tiny_llama(), config)


def test_experts_are_left_dense_and_mentioned(caplog):
    model = tiny_llama()
    model.model.layers[0].mlp.experts = nn.Module()
    model.model.layers[0].mlp.experts.up = nn.Parameter(torch.zeros(4, 64, 96))
    resolve_plan(model, BLRConfig("low_rank", ratio=0.5))
    assert "experts" in caplog.text


def test_layers_too_narrow_for_their_blocks_stay_dense_unless_they_were_named(caplog):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.steer = nn.Linear(64, 8)
    for config in (BLRConfig("blast", ratio=0.5), BLRConfig("low_rank", ratio=0.1)):
        caplog.clear()
        plan = resolve_plan(model, config)
        assert len(plan) == 14 and not any("steer" in name for name in plan)
        message = (
            "2 modules stay dense, too narrow for their blocks: model.layers.0.mlp.steer, model.layers.1.mlp.steer"
        )
        assert [record.getMessage() for record in caplog.records] == [message]
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.steer: out_features 8 is not divisible"):
        resolve_plan(model, BLRConfig("blast", ratio=0.5, target_modules=["q_proj", "steer"]))


def test_matrices_outside_of_linear_layers_are_mentioned_once(caplog):
    sizes = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 64}
    resolve_plan(XLNetLMHeadModel(XLNetConfig(**sizes)), BLRConfig("low_rank", ratio=0.5))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "rel_attn.q, rel_attn.k" in message and "of the model's parameters" in message


def test_stored_plans_name_the_broken_layer():
    layers = layers_from_plan(resolve_plan(tiny_llama(), BLRConfig(ratio=0.5)))
    name = next(iter(layers))
    del layers[name]["bias"]
    with pytest.raises(ValueError, match=rf"{name}: .*bias"):
        plan_from_layers(layers)
