"""What a layer that vLLM serves holds and how it is loaded: all of it that needs no vLLM."""

import configparser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_blr.integration.vllm as plugin
from hf_blr.formats import PLAIN, format_named
from hf_blr.integration.vllm import op
from hf_blr.integration.vllm.division import Division, shards_of
from hf_blr.integration.vllm.op import described, served_linear
from hf_blr.integration.vllm.slots import add_slots
from hf_blr.linear import BLRLinear
from hf_blr.plan import LayerPlan
from hf_blr.structures import Blast, LowRank, Monarch, Pivoted

K = 32
#: the widths of q, k and v in the checkpoint
WIDTHS = (64, 16, 16)
#: matrices that vLLM holds in one layer: three structures, one in bits beside one that is not
MERGED = {
    "q_proj": LayerPlan(Pivoted(K, 64, 8), False, False),
    "k_proj": LayerPlan(LowRank(K, 16, 16), False, False, format_named("int8", 8)),
    "v_proj": LayerPlan(Blast(K, 16, 4, (2, 2)), False, False),
}


def layers(plans, widths=WIDTHS):
    """{name: layer of the checkpoint}."""
    torch.manual_seed(0)
    return {
        name: nn.Linear(K, width, bias=False) if plan is None else plan.build().requires_grad_(False)
        for (name, plan), width in zip(plans.items(), widths, strict=True)
    }


def held(plans, division):
    """A layer as vLLM would have it, before it is loaded."""
    layer = nn.Module()
    layer.shards = nn.ModuleList(shards_of(plans, division, torch.float32))
    add_slots(layer, list(layer.shards))
    return layer


def load(layer, checkpoint, ids):
    """As the model's loader does for merged layers: by attribute, with the shard's id."""
    for (_, module), shard_id in zip(checkpoint.items(), ids, strict=True):
        for key, tensor in module.state_dict().items():
            parent, _, name = key.rpartition(".")
            slot = getattr(layer.get_submodule(parent), name)
            slot.weight_loader(slot, tensor, shard_id)
    assert not any(shard.missing or shard.waiting for shard in layer.shards)


def output(layer, x):
    with torch.no_grad():
        return torch.cat([shard(x) for shard in layer.shards], dim=-1)


@pytest.mark.parametrize("without", [None, "q_proj", "k_proj", "v_proj"], ids=["all", "no q", "no k", "no v"])
@pytest.mark.parametrize("devices, replicas", [(1, 1), (2, 1), (4, 2)])
def test_devices_hold_their_outputs_of_merged_matrices(without, devices, replicas):
    plans = {name: None if name == without else plan for name, plan in MERGED.items()}
    checkpoint, x = layers(plans), torch.randn(5, K)
    here = tuple(width * (replicas if i else 1) // devices for i, width in enumerate(WIDTHS))
    for rank in range(devices):
        division = Division(rank, (K, K), (sum(here) * devices, here), replicas)
        layer = held(plans, division)
        load(layer, checkpoint, "qkv")
        # devices that share heads follow one another
        places = (rank, rank // replicas, rank // replicas)
        wholes = [module(x) for module in checkpoint.values()]
        wanted = [y[:, p * w : (p + 1) * w] for y, p, w in zip(wholes, places, here, strict=True)]
        torch.testing.assert_close(output(layer, x), torch.cat(wanted, dim=-1))


@pytest.mark.parametrize(
    "plan",
    [
        LayerPlan(LowRank(K, 16, 8), False, False),
        LayerPlan(Monarch(K, 16, 4, (4, 2)), False, False, format_named("int4", 4)),
        LayerPlan(Blast(K, 16, 4, (2, 2)), False, False, format_named("fp8")),
    ],
    ids=lambda plan: plan.spec.structure,
)
def test_outputs_of_devices_that_split_the_inputs_add_up(plan):
    checkpoint, x = layers({"down_proj": plan}, [16]), torch.randn(5, K)
    total = torch.zeros(5, 16)
    for rank in range(2):
        layer = held({"down_proj": plan}, Division(rank, (K, K // 2), (16, (16,))))
        load(layer, checkpoint, [None])
        total += output(layer, x[:, rank * K // 2 : (rank + 1) * K // 2])
    torch.testing.assert_close(total, checkpoint["down_proj"](x))


@pytest.mark.parametrize(
    "storage", [PLAIN, format_named("int8"), format_named("int4", 8), format_named("fp8")], ids=str
)
def test_devices_may_add_up_the_rank_between_the_factors(storage):
    spec = LowRank(K, 64, 16)
    checkpoint, x = layers({"down_proj": LayerPlan(spec, False, False, storage)}, [64]), torch.randn(5, K)
    held_by = [
        held({"down_proj": LayerPlan(spec, False, False, storage)}, Division(rank, (K, K // 2), (64, (64,))))
        for rank in range(2)
    ]
    for layer in held_by:
        load(layer, checkpoint, [None])
        assert layer.shards[0].keeps_a_pair
    parts = [layer.shards[0].times("v", part) for layer, part in zip(held_by, x.chunk(2, -1), strict=True)]
    assert parts[0].shape == (5, 16)
    bias = torch.randn(64)
    torch.testing.assert_close(held_by[1].shards[0].times("u", sum(parts), bias), checkpoint["down_proj"](x) + bias)


@pytest.mark.parametrize("spec", [Pivoted(K, 64, 8), Blast(K, 64, 4, (2, 2)), Monarch(K, 64, 4, (2, 2))], ids=str)
def test_other_structures_keep_no_pair(spec):
    (shard,) = shards_of({"down_proj": LayerPlan(spec, False, False)}, Division(0, (K, K), (64, (64,))), torch.float32)
    assert not shard.keeps_a_pair


def test_few_tokens_read_the_codes_of_one_factor(monkeypatch):
    pytest.importorskip("triton")
    plan, found = LayerPlan(LowRank(K, 64, 16), False, False, format_named("int4")), []
    (shard,) = shards_of({"down_proj": plan}, Division(0, (K, K), (64, (64,))), torch.float32)
    linear_in_bits = op.ops.linear_in_bits
    monkeypatch.setattr(op.ops, "linear_in_bits", lambda *a: found.append(a[2].shape[0]) or linear_in_bits(*a))
    for tokens in (1, 5):
        with op.ops.use_impl("triton"):
            shard.times("v", torch.randn(tokens, K))
    assert found == [1, 5]


def test_one_matrix_of_the_file_can_be_several_of_the_layer():
    plans = {"qkv_proj": LayerPlan(LowRank(K, sum(WIDTHS), 8), False, False)}
    checkpoint, x = layers(plans, [sum(WIDTHS)]), torch.randn(5, K)
    layer = held(plans, Division(0, (K, K), (sum(WIDTHS), WIDTHS)))
    load(layer, checkpoint, [None])
    torch.testing.assert_close(output(layer, x), checkpoint["qkv_proj"](x))
    halves = tuple(width // 2 for width in WIDTHS)
    with pytest.raises(NotImplementedError, match=r"qkv_proj: 1 in the checkpoint are 3 matrices.*parallel-size 1"):
        held(plans, Division(0, (K, K), (sum(WIDTHS), halves)))


def test_loaders_that_look_names_up_among_parameters_find_them():
    plans = {name: MERGED[name] for name in ("q_proj", "v_proj")}
    names = set(dict(held(plans, Division(0, (K, K), (80, (64, 16)))).named_parameters()))
    assert {"u", "c", "order", "s", "v"} <= names
    # beside k, which is in bits
    names = set(dict(held(MERGED, Division(0, (K, K), (96, WIDTHS))).named_parameters()))
    assert {"u", "v", "u.weight_packed", "v.weight_scale", "v.weight_shape"} <= names


def test_factors_in_bits_take_their_bits():
    # nothing is unpacked for good
    (shard,) = shards_of({"k_proj": MERGED["k_proj"]}, Division(0, (K, K), (16, (16,))), torch.bfloat16)
    stored = MERGED["k_proj"].storage.num_bytes(MERGED["k_proj"].spec, torch.bfloat16)
    assert sum(tensor.nbytes for tensor in shard.parameters()) == stored


DIVISION = Division(0, (K, K), (16, (16,)))


@pytest.mark.parametrize(
    "plan, division, error",
    [
        (LayerPlan(LowRank(K, 24, 8), False, False), DIVISION, r"o_proj: the plan says 24x32, vLLM's model has 16x32"),
        (MERGED["q_proj"], Division(0, (K, 16), (64, (64,))), r"o_proj: pivoted.*by inputs.*parallel-size 1"),
        (
            LayerPlan(LowRank(K, 16, 8), False, False, format_named("int8", 8)),
            Division(1, (K, 4), (16, (16,))),
            r"o_proj: a device's part of it cannot be stored: rows of v hold 4 numbers",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(plan, division, error):
    with pytest.raises(ValueError, match=error):
        held({"o_proj": plan}, division)


@pytest.mark.parametrize(
    "key, edit, error",
    [
        ("u", lambda t: t[:, 1:], r"q_proj.u must have the shape \(64, 8\), got \(64, 7\)"),
        ("u", lambda t: t * torch.nan, r"q_proj.u: expected finite numbers"),
        ("order", lambda t: t * 0, r"q_proj.order: expected each integer of 0 to 31 once"),
    ],
)
def test_wrong_tensors_are_refused_by_name(key, edit, error):
    plans = {"q_proj": MERGED["q_proj"]}
    slot = getattr(held(plans, Division(0, (K, K), (64, (64,)))), key)
    with pytest.raises(ValueError, match=error):
        slot.weight_loader(slot, edit(layers(plans, [64])["q_proj"].state_dict()[key]))


@pytest.mark.parametrize("shard_id", [(0, 1), 3, None])
def test_a_tensor_of_several_matrices_is_refused(shard_id):
    layer = held(MERGED, Division(0, (K, K), (sum(WIDTHS), WIDTHS)))
    with pytest.raises(NotImplementedError, match=r"q_proj, k_proj, v_proj: vLLM loads shard"):
        layer.order.weight_loader(layer.order, torch.arange(K), shard_id)


@pytest.mark.parametrize("storage", [PLAIN, format_named("int4", 4), format_named("fp8")], ids=lambda s: s.name)
def test_one_op_is_traced_for_any_number_of_tokens(storage):
    spec = LowRank(K, 16, 8)
    layer = BLRLinear.from_spec(spec, bias=False, storage=storage).requires_grad_(False)
    stored, bias, graphs = list(layer.stored().values()), torch.randn(16), []

    def seen(graph, inputs):
        graphs.append(graph)
        return graph

    named = described(spec, storage)
    compiled = torch.compile(
        lambda x: served_linear(named, x, stored, bias, 16), backend=seen, fullgraph=True, dynamic=True
    )
    for tokens in (64, 3):
        x = torch.randn(tokens, K)
        torch.testing.assert_close(compiled(x), layer(x) + bias)
    (graph,) = graphs
    # no factor is made of codes in what is traced
    assert [node.name for node in graph.graph.nodes if node.op == "call_function"] == ["served_linear"]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("spec", [LowRank(K, 16, 16), Monarch(K, 16, 8, (2, 2)), Blast(K, 16, 16, (2, 2))], ids=str)
def test_few_tokens_read_codes_and_many_read_numbers(spec, name, monkeypatch):
    pytest.importorskip("triton")
    storage, found = format_named(name), []
    layer = BLRLinear.from_spec(spec, storage=storage).requires_grad_(False)
    stored, linear_in_bits = list(layer.stored().values()), op.ops.linear_in_bits
    monkeypatch.setattr(op.ops, "linear_in_bits", lambda *a: found.append(a[2].shape[0]) or linear_in_bits(*a))
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, K)
        with op.ops.use_impl("triton"):
            out = served_linear(described(spec, storage), x, stored, layer.bias, 16)
        torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-4)
    assert found == [1, 5]


def test_the_plugin_is_the_one_that_the_package_names():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    name, _, path = setup["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    module, _, function = path.partition(":")
    assert name == "hf_blr" and getattr(import_module(module), function) is plugin.register


def test_an_old_vllm_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "version", lambda name: "0.20.2")
    plugin.register()
    assert f"with vLLM {plugin.OLDEST} or later, found 0.20.2" in caplog.text
