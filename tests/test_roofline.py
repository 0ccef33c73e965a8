"""Counts of arithmetic and traffic, the paper's formulas, and predictions against what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_blr.bench.peaks import deviations, measure_peaks, predictions, spec_of
from hf_blr.cli import main
from hf_blr.formats import FORMATS, PLAIN, format_named
from hf_blr.roofline.devices import DEVICES, Peaks
from hf_blr.roofline.experts import predict_experts
from hf_blr.roofline.stages import FORMS, bound_of, break_even, predict, predict_stored, stages
from hf_blr.roofline.training import training_stages
from hf_blr.structures import FACTOR, Blast, Dense, LowRank, Monarch, Pivoted

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
#: q_proj of Llama-7B as the paper compresses it
LOW_RANK = LowRank(4096, 4096, 1024)
MONARCH = Monarch(4096, 4096, 64, (16, 16))
PIVOTED = Pivoted(4096, 4096, 1184)
BLAST = Blast(4096, 4096, 1024, (16, 16))


def total(kernels):
    return sum(stage.bytes for stage in kernels)


@pytest.mark.parametrize("tokens", [197, 1024, 16384])
def test_intermediates_are_those_of_the_papers_table_2(tokens):
    """arXiv 2512.20861: 4nr, 8bnr and 16bnr bytes, n tokens, b blocks, r the rank over all blocks."""
    n, r, b = tokens, 1024, 16
    for spec, bytes_between in ((LOW_RANK, 4 * n * r), (MONARCH, 8 * b * n * r), (BLAST, 16 * b * n * r)):
        assert sum(sum(stage.between) for stage in stages(spec, n, "paper")) == bytes_between


@pytest.mark.parametrize(
    "spec, form, mebibytes",
    [
        (LOW_RANK, "dense", 48),
        (LOW_RANK, "paper", 36),
        (MONARCH, "paper", 160),
        # s is half a mebibyte, which the paper's table leaves out
        (BLAST, "paper", 288.5),
        # its kernel 5 keeps y and z and no copy of them, as ours with the mix apart
        (BLAST, "hf_blr", 160.5),
        # and Monarch without the copy between
        (MONARCH, "hf_blr", 96),
    ],
)
def test_bytes_of_one_layer(spec, form, mebibytes):
    assert total(stages(spec, 1024, form)) == mebibytes * MIB


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("tokens", [1, 32, 33, 1024])
@pytest.mark.parametrize(
    "spec", [LOW_RANK, PIVOTED, MONARCH, BLAST, Monarch(64, 96, 3, (4, 2)), Blast(96, 64, 7, (2, 8))], ids=str
)
def test_arithmetic_is_that_of_the_spec(spec, tokens, form):
    assert sum(stage.flops for stage in stages(spec, tokens, form)) == spec.flops(tokens)


def test_the_fused_mix_is_done_again_for_every_tile_of_outputs():
    spec, tokens = Blast(4096, 8192, 512, (4, 16)), 1024
    project, fused = stages(spec, tokens)
    # 512 outputs in a block are four tiles, so s and y are multiplied four times
    assert project.flops + fused.flops == spec.flops(tokens) + 3 * 2 * tokens * 16 * 4 * 512
    assert fused.between == (4 * tokens * 512 * 2,)
    assert fused.repeated == (64 * 8) * (4 + 1) * 128 * 512 * 2
    assert [s.name for s in stages(spec, 128)] == ["project", "mix", "expand"]


def test_what_is_launched_decides_the_stages():
    names = lambda spec, tokens, form="hf_blr": [s.name for s in stages(spec, tokens, form)]  # noqa: E731
    assert names(BLAST, 1) == ["project and mix", "expand"]
    assert names(MONARCH, 1024) == ["project", "expand"]
    # ranks that are no multiples of 16, few tiles and much to multiply: copied in order first
    assert names(replace(MONARCH, rank=44), 1024) == ["project", "swap blocks", "expand"]
    assert names(MONARCH, 48) == names(Monarch(4096, 11008, 352, (4, 4)), 1024) == ["project", "swap blocks", "expand"]
    assert names(BLAST, 1024, "paper") == ["project", "permute y", "mix", "permute z", "expand"]
    with pytest.raises(ValueError, match="hf_blr"):
        stages(BLAST, 1, "triton")


def test_pivoted_pays_low_ranks_stages_and_a_gather():
    t, k, r = 1024, 4096, 1184
    gather, project, expand = stages(PIVOTED, t)
    assert gather.flops == 0 and gather.bytes == 2 * (2 * t * k + k) and not gather.product
    # c, what is gathered once more, and the result
    assert project.bytes == 2 * (r * (k - r) + t * k + t * r) and expand == stages(LowRank(k, k, r), t)[1]
    # one token reads each number that is stored once, whatever the rank
    assert [s.name for s in stages(PIVOTED, 1)] == ["gather and project", "expand"]
    assert total(stages(PIVOTED, 1)) == 2 * (PIVOTED.num_parameters + 2 * k + 2 * r)
    assert [s.name for s in stages(PIVOTED, 2)] == [s.name for s in stages(PIVOTED, 1, "pytorch")]


@pytest.mark.parametrize("tokens", [1, 1024, 4096])
def test_a_large_rank_is_predicted_to_cost_less_time_if_pivoted(tokens):
    """So that a budget in milliseconds prefers it; at low-rank's parameters the gather makes it a little slower."""
    device = DEVICES["H100-measured"]
    pivoted, low_rank = (predict(s(4096, 4096, 2048), tokens, device) for s in (Pivoted, LowRank))
    assert pivoted < low_rank
    assert 0.95 < predict(PIVOTED, tokens, device) / predict(LOW_RANK, tokens, device) < 1.15


@pytest.mark.parametrize("tokens", [33, 4096])
@pytest.mark.parametrize("spec", [LOW_RANK, PIVOTED, MONARCH, BLAST, Blast(4096, 4096, 1024, (4, 4))], ids=str)
def test_a_training_step_is_three_times_the_products(spec, tokens):
    kernels = training_stages(spec, tokens)
    s = spec.shapes(FACTOR).get("s", (0, 0, 0))
    mix = 2 * tokens * s[0] * s[1] * s[2]
    # z again, dy and ds beside the forward's mix; the first product again where y was too large to keep
    expected = 3 * (spec.flops(tokens) - mix) + 4 * mix
    again = "project again" in [stage.name for stage in kernels]
    assert again == (spec.num_blocks == (16, 16))
    assert sum(stage.flops for stage in kernels) == expected + again * kernels[0].flops
    dense = training_stages(spec, tokens, "dense")
    assert sum(stage.flops for stage in dense) == 3 * 2 * tokens * 4096 * 4096


def test_ds_of_few_pairs_of_blocks_comes_with_z_and_dy():
    few, many = (training_stages(Blast(4096, 4096, 1024, (b, b)), 4096) for b in (4, 16))
    assert [s.name for s in few[3:5]] == ["dz", "z, dy and ds"]
    assert [s.name for s in many[4:8]] == ["dz", "z", "dy", "ds"]
    assert few[4].bytes == 2 * (2 * 2 * 4 * 4096 * 1024 + 2 * 16 * 1024)
    with pytest.raises(ValueError, match="dense or hf_blr"):
        training_stages(BLAST, 4096, "paper")


def test_float8_moves_one_byte_a_number_behind_a_cast():
    t, k, r = 1024, 4096, 1024
    cast, project, expand = stages(LOW_RANK, t, "float8")
    # x is read in 16 bits and written in 8, which the next stage finds in L2; outputs are of 16 bits
    assert (cast.outside, cast.between, cast.flops, cast.product) == (2 * t * k, (t * k,), 0, False)
    assert (project.outside, project.between) == (r * k, (t * k, t * r))
    assert (expand.outside, expand.between) == (k * r + 2 * t * k, (t * r,))
    assert [s.float8 for s in (cast, project, expand)] == [False, True, True]
    names = lambda spec: [(s.name, s.float8) for s in stages(spec, t, "float8")]  # noqa: E731
    mixed = [("weights of the mix", False), ("mix", False)]
    assert names(BLAST) == [("cast", False), ("project", True), *mixed, ("expand", True)]
    # y lands where it is read
    assert names(Monarch(4096, 11008, 352, (4, 4))) == [("cast", False), ("project", True), ("expand", True)]
    assert names(PIVOTED) == [("cast", False), ("gather", False), ("project", True), ("expand", True)]
    assert names(Dense(4096, 4096, 4096)) == [("cast", False), ("product", True)]


def test_float8_is_multiplied_at_a_rate_of_its_own():
    device = Peaks("card", flops=1e12, bandwidth=1e15, l2=1e9, float8_flops=2e12)
    _, project, _ = stages(LOW_RANK, 1024, "float8")
    assert project.seconds(device) == project.flops / 2e12
    assert predict(LOW_RANK, 4096, DEVICES["H200"], "float8") < 0.7 * predict(LOW_RANK, 4096, DEVICES["H200"])
    with pytest.raises(ValueError, match=r"A100 multiplies no float8; take a device of compute capability 8\.9"):
        predict(LOW_RANK, 4096, DEVICES["A100"], "float8")


def test_float8_counts_the_tiles_of_our_kernels_and_not_of_cublas():
    def tiles(spec, tokens):
        return [stage.tiles for stage in stages(spec, tokens, "float8") if stage.product]

    # 128 x 128 outputs; cuBLAS multiplies a last stage of one block and many tiles
    assert tiles(LOW_RANK, 4096) == [32 * 8, 0]
    assert tiles(LowRank(4096, 1024, 400), 1024) == [8 * 4, 8 * 8]
    assert tiles(Monarch(4096, 11008, 352, (4, 4)), 1024) == [16 * 8 * 3, 4 * 8 * 22]
    assert tiles(Blast(4096, 4096, 1008, (4, 4)), 1024) == [4 * 8 * 8] * 2
    assert tiles(Dense(4096, 4096, 4096), 4096) == [0]


def test_gathers_bound_a_stage_where_their_rate_is_known():
    gather = stages(PIVOTED, 1024, "float8")[1]
    device = Peaks("card", flops=1e12, bandwidth=1e15, l2=1e9)
    assert gather.name == "gather" and gather.gathered == 1024 * 4096
    assert gather.seconds(replace(device, gathers=1e9)) == 1024 * 4096 / 1e9
    assert "gathers" not in gather.bounds(device) and gather.times(2).gathered == 2 * 1024 * 4096


def test_rows_in_fp8_are_predicted_as_such():
    row = {"structure": "low_rank", "in_features": 4096, "out_features": 4096, "rank": 1024, "blocks": [1, 1]}
    row |= {"tokens": 4096, "direction": "forward", "impl": "hf_blr", "us": 1.0}
    dense = row | {"structure": "dense", "impl": "cublas", "rank": 4096}
    rows = [row, *({**row, "format": name} for name in ("plain", "fp8", "int4")), {**dense, "format": "fp8"}]
    found = predictions(rows, DEVICES["H200"])
    assert [r.get("format") for r in found] == [None, "plain", "fp8", "fp8"]
    times = [r["predicted_us"] for r in found]
    assert times[0] == times[1] == predict(LOW_RANK, 4096, DEVICES["H200"]) * 1e6
    assert times[2] == predict(LOW_RANK, 4096, DEVICES["H200"], "float8") * 1e6
    assert times[3] == predict(Dense(4096, 4096, 4096), 4096, DEVICES["H200"], "float8") * 1e6
    # so many blocks become numbers first
    many = {**row, "format": "fp8", "structure": "monarch", "blocks": [16, 16], "rank": 64}
    (found,) = predictions([many], DEVICES["H200"])
    numbers = predict_stored(MONARCH, FORMATS["fp8"], 4096, DEVICES["H200"])
    assert found["predicted_us"] == numbers * 1e6
    # few tokens take another way, and A100 has no float8
    assert not predictions([{**row, "format": "fp8", "tokens": 16}], DEVICES["H200"])
    assert not predictions([{**row, "format": "fp8"}], DEVICES["A100"])


def test_an_intermediate_that_fits_half_of_l2_costs_no_memory():
    small, large = (Peaks("", 1e12, 1e12, l2) for l2 in (1e6, 1e9))
    project = stages(BLAST, 1024)[0]
    assert project.memory_bytes(large.l2) == project.outside == 16 * MIB
    assert project.memory_bytes(small.l2) == project.bytes == 48 * MIB


def test_predictions_by_hand():
    device = Peaks("", flops=1e12, bandwidth=1e9, l2=0, product_seconds=1e-3, kernel_seconds=1e-4)
    spec = LowRank(100, 50, 10)
    # 64 tokens: both stages bound by bytes
    expected = 2 * (64 * 100 + 10 * 100 + 64 * 10) / 1e9 + 2 * (64 * 10 + 50 * 10 + 64 * 50) / 1e9
    assert predict(spec, 64, device) == pytest.approx(expected + 2e-3)
    expected = 2 * (100 + 10 * 100 + 10) / 1e9 + 2 * (10 + 50 * 10 + 50) / 1e9
    assert predict(spec, 1, device) == pytest.approx(expected + 2e-4)
    assert predict(spec, 1, device, itemsize=4) == pytest.approx(2 * expected + 2e-4)
    assert bound_of(stages(spec, 1), device) == "starts"
    assert bound_of(stages(LOW_RANK, 4096), DEVICES["H100"]) == "arithmetic"
    assert bound_of(stages(BLAST, 1), DEVICES["Orin-Nano-8GB"]) == "memory"


def test_break_even_tokens():
    for device in DEVICES.values():
        changes = break_even(BLAST, device, "paper", most=4096)
        # half the bytes to read at one token, unless five kernels take too long to start beside so fast a memory
        assert changes[0] == (1, device.name != "H200-measured")
        assert break_even(BLAST, replace(device, kernel_seconds=1e-3), "paper", most=1) == [(1, False)]
        for (tokens, faster), (_, before) in zip(changes[1:], changes, strict=False):
            assert faster is not before
            for t, now in ((tokens - 1, before), (tokens, faster)):
                assert (predict(BLAST, t, device, "paper") < predict(BLAST, t, device, "dense")) is now
    # nothing but factors to read and arithmetic to do: low-rank at half the parameters is never slower
    assert break_even(LowRank(4096, 4096, 1000), replace(DEVICES["H100"], l2=1e12)) == [(1, True)]


def test_predictions_of_layers_in_formats_on_an_h200():
    rows = json.loads((ROOT / "benchmarks/results/layers_h200.json").read_text())["rows"]
    predicted = predictions(rows, DEVICES["H200-measured"])
    assert {row["format"] for row in predicted} == {"plain", "fp8"}
    assert sum(abs(row["deviation"]) <= 0.25 for row in predicted) > 0.95 * len(predicted)


def test_predictions_against_the_kept_measurements():
    """The goal is 25 %; where single rows miss it, `hf-blr roofline --check` says by how much."""
    rows = json.loads((ROOT / "benchmarks/results/layers_h100.json").read_text())["rows"]
    predicted = predictions(rows, DEVICES["H100-measured"])
    # PyTorch's forms are not predicted
    assert len(predicted) == sum(row["impl"] in ("hf_blr", "cublas") for row in rows)
    table = {(row["direction"], row["tokens"], row["structure"]): row for row in deviations(predicted)}
    for tokens in (1, 16, 1024, 4096):
        assert table["forward", tokens, "all"]["median |off| %"] < 25
    for structure in ("dense", "low_rank", "monarch"):
        assert table["forward+backward", 4096, structure]["median |off| %"] < 25
    row = next(r for r in predicted if r["structure"] == "blast" and r["tokens"] == 1024)
    assert row["deviation"] == row["predicted_us"] / row["us"] - 1
    # a row of an own shape carries its sizes
    assert spec_of({**row, "in_features": 64, "out_features": 128}).in_features == 64


def test_ceilings_are_measured_on_any_device():
    found = measure_peaks("cpu", size=64, copied_bytes=1 << 16)
    assert found.flops > 0 and found.bandwidth > 0 and found.few_bandwidth > 0 and found.kernel_seconds > 0


def test_few_tokens_draw_less_where_a_device_says_so():
    device = Peaks("", flops=1e30, bandwidth=2e9, l2=1e9, few_bandwidth=1e9, kernel_seconds=0.0)
    for tokens, rate in ((1, 2e9), (2, 1e9), (32, 1e9), (33, 2e9)):
        kernels = stages(LOW_RANK, tokens)
        assert sum(s.seconds(device) for s in kernels) == pytest.approx(
            sum(s.memory_bytes(1e9) for s in kernels) / rate
        )
    # cuBLAS' products keep their rate, and sum their parts in a second kernel
    names = [s.name for s in stages(LOW_RANK, 16, "dense")]
    assert names == ["x W^T", "sum of parts"] and len(stages(LOW_RANK, 33, "dense")) == 1
    assert not any(s.few for s in stages(LOW_RANK, 16, "dense"))


def test_long_rows_of_few_tokens_are_products_and_a_mix():
    down = Blast(11008, 4096, 1488, (4, 4))
    assert [s.name for s in stages(down, 32)] == ["project", "mix", "expand"]
    assert [s.name for s in stages(down, 16)] == ["project and mix", "expand"]
    assert sum(s.flops for s in stages(down, 32)) == down.flops(32)


def test_layers_that_run_together_are_launched_by_the_tiles_of_all():
    q = Monarch(4096, 4096, 256, (4, 4))
    assert [s.name for s in stages(q, 128)] == ["project", "swap blocks", "expand"]
    assert [s.name for s in stages(q, 128, layers=3)] == ["project", "expand"]


def test_our_tiles_cost_time_and_cublas_tiles_do_not():
    device = Peaks("", flops=1e30, bandwidth=1e30, l2=1e9, tile_seconds=1.0)
    wide = Monarch(4096, 11008, 352, (4, 4))

    def seconds(spec, tokens, **kw):
        return round(sum(s.seconds(device) for s in stages(spec, tokens, **kw)))

    # in place; copied for cuBLAS, or in our kernel where there is something to add, ragged tiles as whole ones
    assert seconds(Monarch(4096, 4096, 256, (4, 4)), 1024) == 8 * 32
    assert seconds(wide, 1024) == 0 and seconds(wide, 1024, adds=True) == 8 * 4 * 22
    assert seconds(LOW_RANK, 1000) == 0 and seconds(LOW_RANK, 1000, adds=True) == 8 * 32
    assert seconds(Blast(4096, 8192, 512, (4, 16)), 1024) == 8 * 64
    assert seconds(wide, 32, adds=True) == seconds(LOW_RANK, 1000, form="pytorch", adds=True) == 0


def test_odd_outputs_draw_less_at_few_tokens():
    device = Peaks("", flops=1e30, bandwidth=2.0, l2=1e30, odd_bandwidth=1.0)
    odd, even = (
        [stages(LowRank(64, n, 1), t, "dense")[0].seconds(device) / (t * (64 + n) + 64 * n) for t in (1, 2, 33)]
        for n in (57, 56)
    )
    assert odd == [1.0, 2.0, 1.0] and even == [1.0, 1.0, 1.0]


def test_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "r.json"
    small = ["--shapes", "512x768", "--blocks", "4", "--tokens", "1", "64", "--device", "A40"]
    assert main(["roofline", *small, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 8 and result["device"]["bandwidth"] == 696e9
    assert "faster than dense from 1 tokens on" in capsys.readouterr().out
    assert main(["roofline", *small, "--stages", "--structures", "blast"]) == 0
    assert "project and mix" in capsys.readouterr().out
    assert main(["roofline", "--check", str(ROOT / "benchmarks/results/layers_h100.json")]) == 0
    assert "within 25 %" in capsys.readouterr().out
    assert main(["roofline", "--check", str(ROOT / "benchmarks/results/groups_h100.json")]) == 2
    assert "bench layers" in capsys.readouterr().err


def test_packed_factors_count_with_their_bytes():
    storage = format_named("int4", 32)
    for spec in (Dense(512, 256, 256), LowRank(512, 256, 64), Blast(512, 256, 64, (4, 4))):
        plain, packed = stages(spec, 1), stages(spec, 1, storage=storage)
        saved = PLAIN.num_bytes(spec, torch.bfloat16) - storage.num_bytes(spec, torch.bfloat16)
        assert abs(sum(s.outside for s in plain) - sum(s.outside for s in packed) - saved) <= len(plain)
        assert predict(spec, 1, DEVICES["H200"], storage=storage) < predict(spec, 1, DEVICES["H200"])
    with pytest.raises(ValueError, match="int4 at 33 tokens"):
        stages(spec, 33, storage=storage)
    with pytest.raises(ValueError, match="int3"):
        stages(spec, 1, storage=format_named("int3"))


@pytest.mark.parametrize(
    "spec", [LOW_RANK, Blast(4096, 4096, 1024, (4, 4)), Dense(4096, 4096, 4096)], ids=lambda spec: spec.structure
)
def test_layers_in_fp8_multiply_in_float8_at_many_tokens_where_the_card_does(spec):
    fp8 = format_named("fp8")
    assert predict_stored(spec, fp8, 4096, DEVICES["H100"]) == predict(spec, 4096, DEVICES["H100"], "float8")
    # few tokens read codes, and a card without float8 makes numbers of them
    assert predict_stored(spec, fp8, 32, DEVICES["H100"]) == predict(spec, 32, DEVICES["H100"], storage=fp8)
    assert predict_stored(spec, fp8, 4096, DEVICES["A100"]) > predict(spec, 4096, DEVICES["A100"])
    # experts have no such products
    one, many = (predict_experts(spec, storage, 4096, 1, DEVICES["H100"]) for storage in (PLAIN, fp8))
    assert many > one


def test_layers_in_bits_take_what_is_stored_at_few_tokens_and_a_pass_to_numbers_at_many():
    device, spec = DEVICES["H100"], LowRank(4096, 4096, 1024)
    plain, int4, int3 = PLAIN, format_named("int4", 64), format_named("int3", 64)
    for tokens in (1, 1024):
        assert predict_stored(spec, plain, tokens, device) == predict(spec, tokens, device)
    # one token: a quarter of the bytes, and nothing but bytes
    assert predict_stored(spec, int4, 1, device) < 0.6 * predict(spec, 1, device)
    whole = Dense(4096, 4096, 4096)
    assert predict_stored(whole, int4, 1, device) < 0.5 * predict(whole, 1, device, form="dense")
    # no kernel reads 3 bits, nor any at many tokens: numbers are written first
    for storage, tokens in ((int3, 1), (int4, 1024)):
        moved = storage.num_bytes(spec, torch.bfloat16) + plain.num_bytes(spec, torch.bfloat16)
        more = moved / device.bandwidth + device.kernel_seconds
        assert predict_stored(spec, storage, tokens, device) == pytest.approx(predict(spec, tokens, device) + more)
