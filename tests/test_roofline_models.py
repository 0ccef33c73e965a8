"""Whole models: what is counted, against sums by hand, and predictions against what was measured."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_shape

from hf_blr.bench.model_peaks import model_predictions, model_sizes_of, sizes_of
from hf_blr.bench.models import SHAPES
from hf_blr.bench.variants import Variant, build_model
from hf_blr.cli import main
from hf_blr.ops.rules.swap import reads_swapped
from hf_blr.roofline.devices import DEVICES, Peaks
from hf_blr.roofline.stages import stages
from hf_blr.roofline.whole_models import (
    EAGER_KERNELS,
    Projection,
    forward_parts,
    forward_seconds,
    group_stages,
    layer_stages,
    step_parts,
    step_seconds,
)
from hf_blr.structures import Blast, LowRank, Monarch

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
#: counts one thing each
BYTES = Peaks("", flops=1e30, bandwidth=1.0, l2=1e30)
FLOPS = Peaks("", flops=1.0, bandwidth=1e30, l2=1e30)
STARTS = Peaks("", flops=1e30, bandwidth=1e30, l2=1e30, product_seconds=100.0, kernel_seconds=1.0)


def parameters(sizes):
    layers = [p for group in sizes.groups for p in group]
    numbers = [p.spec.in_features * p.spec.out_features if p.form == "dense" else p.spec.num_parameters for p in layers]
    return sizes.blocks * sum(numbers)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.kind != "diffusion"])
def test_projections_are_those_of_the_model(name):
    dense = model_sizes_of(name, "dense", 0.5)
    half = model_sizes_of(name, "low_rank+fused", 0.5)
    assert dense.blocks == half.blocks and 0.4 < parameters(half) / parameters(dense) <= 0.5
    assert all(p.form == "hf_blr" for group in half.groups for p in group)
    image = name == "ViT-B/16"
    assert (dense.causal, dense.patches) == (not image, (768, 768) if image else None)


def test_sizes_of_llama_3_8b():
    sizes = model_sizes_of("Llama-3-8B", "blast:4x4+fused", 0.5)
    assert [len(group) for group in sizes.groups] == [3, 1, 2, 1]
    assert (sizes.blocks, sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim) == (32, 4096, 32, 8, 128)
    assert sizes.activation == (2 * 14336, 14336) and sizes.norms == (2, 1) and sizes.rotary
    assert sizes.head == (4096, 128256)
    assert [len(group) for group in model_sizes_of("Llama-3-8B", "blast:4x4", 0.5).groups] == [1] * 7


def test_a_decoding_step_reads_every_weight_and_the_whole_cache():
    sizes, batch, cache = model_sizes_of("Llama-7B", "dense", 0.5), 2, 192
    weights = 2 * (parameters(sizes) + 4096 * 32000)
    keys_and_values = 2 * 32 * 2 * batch * cache * 4096
    counted = step_seconds(sizes, batch, cache, BYTES)
    # what passes between the kernels is little beside these
    assert weights + keys_and_values < counted < 1.01 * (weights + keys_and_values)


def test_grouped_queries_are_read_once_and_written_and_read_for_each_head():
    sizes = model_sizes_of("Llama-3-8B", "dense", 0.5)
    one, more = (step_seconds(sizes, 1, cache, BYTES) for cache in (1000, 2000))
    assert more - one == pytest.approx(32 * 2 * 1000 * 128 * (2 * 8 + 4 * 32))
    eager = step_seconds(sizes, 1, 2000, BYTES, one_block=False) - step_seconds(sizes, 1, 1000, BYTES, one_block=False)
    assert eager == pytest.approx(32 * 2 * 1000 * 128 * 2 * 8)


def test_our_attention_reads_grouped_queries_keys_as_they_are():
    for variant in ("dense+attention", "monarch:4x4+fused"):
        sizes = model_sizes_of("Llama-3-8B", variant, 0.5)
        assert sizes.own_attention and sizes.fused_activation == (variant != "dense+attention")
        one, more = (step_seconds(sizes, 1, cache, BYTES) for cache in (1000, 2000))
        assert more - one == pytest.approx(32 * 2 * 1000 * 128 * 2 * 8)
    # the sum of its pieces is a kernel
    plain, ours = (step_parts(model_sizes_of("Llama-7B", v, 0.5), 1, 192, STARTS) for v in ("dense", "dense+attention"))
    assert ours["elementwise"] - plain["elementwise"] == pytest.approx(32)


@pytest.mark.parametrize("name, causal", [("Llama-7B", 2), ("ViT-B/16", 1)])
def test_arithmetic_of_a_forward(name, causal):
    sizes, tokens = model_sizes_of(name, "dense", 0.5), 197
    attention = sizes.blocks * 4 * 3 * sizes.heads * sizes.head_dim * (tokens * tokens // causal)
    head = 2 * 3 * sizes.head[0] * sizes.head[1]
    patches = 2 * 3 * tokens * 768 * 768 if sizes.patches else 0
    expected = 2 * 3 * tokens * parameters(sizes) + attention + head + patches
    assert forward_seconds(sizes, 3, tokens, FLOPS) == pytest.approx(expected)
    parts = forward_parts(sizes, 3, tokens, FLOPS)
    assert parts["projections"] == pytest.approx(2 * 3 * tokens * parameters(sizes))
    assert parts["attention"] == pytest.approx(attention) and parts["once"] == pytest.approx(head + patches)
    assert parts["elementwise"] < 1e-6


def test_attention_takes_at_least_its_exponentials():
    device = Peaks("", flops=1e30, bandwidth=1e30, l2=1e30, scores=1.0)
    for name, pairs in (("Llama-3.2-1B", 64 * 64 // 2), ("ViT-B/16", 64 * 64)):
        sizes = model_sizes_of(name, "dense", 0.5)
        assert forward_parts(sizes, 3, 64, device)["attention"] == sizes.blocks * 3 * sizes.heads * pairs


def test_what_our_last_stages_add():
    def adding(name, variant):
        return [[p.adds for p in group] for group in model_sizes_of(name, variant, 0.5).groups]

    # GPT-2: biases everywhere, and the activation in the first of the MLP. cuBLAS adds those of single low-rank layers
    assert adding("GPT2-S", "monarch:4x4") == [[True]] * 4 and adding("GPT2-S", "low_rank") == [[False]] * 4
    assert adding("GPT2-S", "low_rank+fused") == [[False], [False], [True], [False]]
    assert adding("ViT-B/16", "low_rank+fused") == [[True] * 3, [False], [True], [False]]
    # a gated MLP multiplies in a kernel of its own
    assert adding("Llama-7B", "monarch:4x4+fused") == [[False] * 3, [False], [False] * 2, [False]]
    assert adding("GPT2-S", "dense") == [[False]] * 4


def test_kernels_of_a_step():
    sizes = sizes_of(build_model(tiny_shape(), Variant("dense"), 0.5, "meta", torch.float32), fused=False)
    # two blocks of 7 products and the sums of their parts, attention, which starts as a product of many tokens does,
    # 2 norms, rotation and activation; the last norm, the head and its sum, the embeddings.
    # compiled blocks write values into the cache, and keys and values once for each query head
    block = 14 + 100 + 4
    assert step_seconds(sizes, 1, 16, STARTS) == pytest.approx(2 * (block + 3) + 4)
    assert step_seconds(sizes, 1, 16, STARTS, one_block=False) == pytest.approx(2 * (block + EAGER_KERNELS) + 4)
    # a forward of many tokens: products and attention are such, but the head sees one token
    assert forward_seconds(sizes, 1, 64, STARTS) == pytest.approx(2 * (8 * 100 + 4) + 4)


def test_a_fused_activation_is_no_kernel():
    plain, fused = (model_sizes_of("GPT2-S", name, 0.5) for name in ("low_rank", "low_rank+fused"))
    for tokens in (1, 64):
        parts = [forward_parts(sizes, 1, tokens, STARTS)["elementwise"] for sizes in (plain, fused)]
        assert parts[0] - parts[1] == pytest.approx(12)
    gated = model_sizes_of("Llama-3.2-1B", "low_rank+fused", 0.5)
    assert forward_parts(gated, 1, 64, STARTS)["elementwise"] == pytest.approx(16 * 4)
    # and the sum of attention's pieces
    assert step_parts(gated, 1, 64, STARTS, one_block=False)["elementwise"] == pytest.approx(16 * (4 + EAGER_KERNELS))


@pytest.mark.parametrize("tokens", [1, 1024])
@pytest.mark.parametrize("spec", [Blast(64, 96, 8, (4, 4)), Monarch(64, 96, 32, (4, 4)), LowRank(64, 96, 8)], ids=str)
def test_a_group_of_equal_layers_is_as_many_kernels_as_one(spec, tokens):
    alone = stages(spec, tokens)
    together = group_stages((Projection(spec),) * 3, tokens)
    assert [s.name for s in together] == [s.name for s in alone]
    assert sum(s.flops for s in together) == 3 * sum(s.flops for s in alone)
    # the input is read once instead of three times
    assert sum(s.bytes for s in together) == 3 * sum(s.bytes for s in alone) - 2 * tokens * 64 * 2


def test_a_group_is_launched_by_the_same_rule_as_the_kernels():
    spec = Monarch(4096, 4096, 256, (4, 4))
    for tokens in (48, 128, 256, 1024):
        for group in ((Projection(spec),) * 3, (Projection(spec),)):
            names = [s.name for s in group_stages(group, tokens)]
            assert ("swap blocks" in names) != reads_swapped(4, 4 * len(group), 1024, 256, tokens)
    # a bias in one of them: their last stages differ
    names = [s.name for s in group_stages((Projection(spec, adds=True), Projection(spec)), 128)]
    assert names == ["project", "expand", "swap blocks", "expand"]


def test_unequal_layers_share_the_first_stage():
    wide, narrow = Blast(64, 96, 8, (4, 4)), Blast(64, 32, 8, (4, 4))
    names = [s.name for s in group_stages((Projection(wide), Projection(narrow)), 1)]
    assert names == ["project and mix", "expand", "expand"]
    assert layer_stages(64, 32, 1, 2)[0].bytes == 2 * (64 + 32 + 64 * 32)


@pytest.mark.slow
def test_most_of_what_was_measured_was_predicted():
    rows = json.loads((RESULTS / "models_h100.json").read_text())["rows"]
    predicted = model_predictions(rows, DEVICES["H100-measured"])
    assert {row["measurement"] for row in predicted} == {"prefill", "decode"}
    assert sum(abs(row["deviation"]) <= 0.25 for row in predicted) >= 0.9 * len(predicted)
    for row in predicted:
        measured = row["ms"] if row["measurement"] == "prefill" else row["graph_ms"]
        assert row["deviation"] == pytest.approx(row["predicted_ms"] / measured - 1)


def test_prefill_in_float8_is_predicted():
    rows = json.loads((RESULTS / "models_h200.json").read_text())["rows"]
    rows = [row for row in rows if row["model"] == "Llama-3-8B"]
    predicted = model_predictions(rows, DEVICES["H200-measured"])
    in_float8 = {(row["variant"], row["tokens"]) for row in predicted if "/fp8" in row["variant"]}
    assert {(name, n) for name in ("dense/fp8", "low_rank@128/fp8+fused") for n in (1024, 4096)} < in_float8
    assert all(abs(row["deviation"]) < 0.25 for row in predicted)
    # a card without float8, and formats whose kernels are not counted
    assert len(model_predictions(rows, DEVICES["A100"])) == len(predicted) - len(in_float8)
    other = {**rows[0], "variant": "low_rank/int4+fused"}
    assert model_predictions([other], DEVICES["H200"]) == []


def test_layers_in_float8_share_their_cast():
    wide, narrow = (Projection(LowRank(4096, n, r), "float8") for n, r in ((4096, 1024), (1024, 400)))
    names = [stage.name for stage in group_stages((wide, narrow, narrow), 4096)]
    assert names == ["cast", *["project", "expand"] * 3]


def test_rows_of_other_kinds_are_left_out():
    row = {"model": "Llama-7B", "variant": "dense", "measurement": "prefill", "batch": 1, "tokens": 128, "ms": 6.0}
    others = [
        {**row, "form": "eager"},
        {**row, "form": "compiled", "measurement": "training"},
        {**row, "form": "compiled", "model": "mine"},
        {**row, "form": "compiled", "model": "DiT-XL/2"},
        {"model": "Llama-7B", "variant": "dense", "measurement": "decode", "form": "compiled", "error": "no memory"},
    ]
    assert model_predictions(others, DEVICES["H100"]) == []
    assert len(model_predictions([{**row, "form": "compiled"}], DEVICES["H100"])) == 1


def test_check_from_the_command_line(capsys, tmp_path):
    file = tmp_path / "checked.json"
    assert main(["roofline", "--check", str(RESULTS / "models_h100.json"), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "predicted ms" in out and "measured ms" in out and "Llama-3.2-1B" in out
    assert json.loads(file.read_text())["rows"][0]["predicted_ms"] > 0
