"""`hf-blr bench layers`: shapes, rows, errors, and what is compiled before."""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch

from hf_blr.bench import cases, layers, timing
from hf_blr.bench.in_bits import float8_dense, in_format
from hf_blr.bench.shapes import LAYERS, aligned_spec
from hf_blr.cli import main
from hf_blr.cli.bench_layers import sizes
from hf_blr.formats import FORMATS
from hf_blr.structures import LowRank, Monarch

STRUCTURES = ("low_rank", "pivoted", "monarch", "blast")

ROOT = Path(__file__).parents[1]


def test_the_cases_are_those_of_the_kept_results():
    """The same rows can be measured again: layers, ranks, blocks, tokens, directions."""
    kept = json.loads((ROOT / "benchmarks/results/layers_h100.json").read_text())["rows"]
    measured = {row["structure"] for row in kept}
    wanted = {
        (case.model, case.layer.name, case.tokens, case.direction, s.structure, s.num_blocks, s.rank)
        for case in cases.paper_cases(LAYERS, cases.TOKENS, (cases.FORWARD, cases.TRAINING))
        for s in case.specs
        if s.structure in measured
    }
    keys = ("model", "layer", "tokens", "direction", "structure")
    assert wanted == {(*(r[k] for k in keys), tuple(r["blocks"]), r["rank"]) for r in kept if r["structure"] != "dense"}


def test_paper_specs_halve_the_llama_layers():
    for layer in LAYERS["Llama-7B"]:
        for structure in ("low_rank", "monarch", "blast"):
            assert 0.49 < layer.paper_spec(structure).ratio < 0.52
    assert LAYERS["Llama-7B"][0].paper_spec("monarch") == Monarch(4096, 4096, 64, (16, 16))
    with pytest.raises(ValueError, match="no monarch"):
        LAYERS["DiT-XL/2"][0].paper_spec("monarch")


def test_our_ranks_are_multiples_that_the_kernels_like():
    spec = aligned_spec("blast", 4096, 4096, 0.5, (4, 4))
    assert spec.rank == 1008 and spec.ratio <= 0.5
    assert aligned_spec("monarch", 4096, 4096, 0.5, (4, 4)).rank == 256
    # below the multiple the rank stays as it is rather than vanish
    assert aligned_spec("low_rank", 16, 16, 0.5).rank == 4
    # 1016 of BLAST would be cut by an eighth
    ranks = [aligned_spec("low_rank", 4096, n, 0.5, multiple=128).rank for n in (14336, 1024)]
    assert ranks == [1536, 384] and aligned_spec("blast", 4096, 4096, 0.5, (4, 4), 128) == spec


def test_pivoted_layers_store_what_low_rank_does():
    for layer in LAYERS["Llama-7B"]:
        low_rank, pivoted = layer.specs(small=False)[:2]
        assert pivoted.structure == "pivoted" and pivoted.rank % 16 == 0
        assert 0.98 * low_rank.num_parameters < pivoted.num_parameters <= low_rank.num_parameters
    u, c, order = layers.random_factors(pivoted, "cpu", torch.bfloat16)
    assert order.dtype == torch.int32 and order.unique().equal(torch.arange(pivoted.in_features).int())
    assert (order[: pivoted.rank].diff() > 0).all() and (order[pivoted.rank :].diff() > 0).all()
    assert not order.equal(torch.arange(pivoted.in_features).int())


def test_chosen_structures_alone():
    (case,) = cases.shape_cases([(32, 48)], [(2, 2)], 0.5, [1], [cases.FORWARD], ["blast", "low_rank"])
    assert [(spec.structure, spec.num_blocks) for spec in case.specs] == [("blast", (2, 2)), ("low_rank", (1, 1))]


def test_rows_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "layers.json"
    arguments = ["bench", "layers", "--shapes", "32x48", "--blocks", "4", "--tokens", "2", "--device", "cpu"]
    options = ["--dtype", "float32", "--impls", "hf_blr", "eager", "--commit", "abc", "--json", str(file)]
    assert main([*arguments, *options]) == 0
    result = json.loads(file.read_text())
    assert result["environment"]["commit"] == "abc" and result["dtype"] == "float32" and result["protocol"]
    forward = [row for row in result["rows"] if row["direction"] == "forward"]
    assert [(r["structure"], r["impl"]) for r in forward] == [
        ("dense", "eager"),
        ("low_rank", "hf_blr"),
        ("low_rank", "eager"),
        ("pivoted", "hf_blr"),
        ("monarch", "hf_blr"),
        ("blast", "hf_blr"),
    ]
    for row in result["rows"]:
        assert row["us"] > 0 and 0 < row["rel_error"] < 1e-5
        assert row["speedup_vs_dense"] == row["dense_us"] / row["us"]
    assert len(result["rows"]) == 12
    assert capsys.readouterr().out.count("blast") == 2
    # a second run adds to the first only when told to
    assert main([*arguments, *options, "--append"]) == 0
    assert len(json.loads(file.read_text())["rows"]) == 24


def test_formats_are_rows_of_their_own():
    case = cases.shape_cases([(32, 48)], [(4, 4)], 0.5, [40], [cases.FORWARD], STRUCTURES)[0]
    rows = layers.bench_case(case, timing.Timer("cpu", 0.0, 1), torch.float32, ["hf_blr"], formats=["plain", "int8"])
    kinds = [(row["structure"], row["format"]) for row in rows]
    assert kinds[0] == ("dense", "plain") and kinds[1:] == [
        (structure, name) for structure in ("low_rank", "pivoted", "monarch", "blast") for name in ("plain", "int8")
    ]
    # the error of arithmetic, not that of rounding the weights; no float8 on a CPU to compare with
    assert all(0 < row["rel_error"] < 1e-5 and row["dense_fp8_us"] is None for row in rows)
    # codes do not train
    case = cases.shape_cases([(32, 48)], [(4, 4)], 0.5, [40], [cases.TRAINING], STRUCTURES)[0]
    rows = layers.bench_case(case, timing.Timer("cpu", 0.0, 1), torch.float32, ["hf_blr"], formats=["int8"])
    assert [row["structure"] for row in rows] == ["dense"]


def test_the_float8_layers_are_what_they_are_compared_with():
    spec = LowRank(64, 48, 16)
    factors = layers.random_factors(spec, torch.device("cpu"), torch.float32)
    forward, stored, exact = in_format(spec, FORMATS["fp8"], factors)
    x = torch.randn(5, 64)
    with torch.no_grad():
        numbers = exact(x.double(), *stored)
        torch.testing.assert_close(forward(x, *stored).double(), numbers, rtol=1e-4, atol=1e-5)
        # what is handed in runs, copies too
        forward(x, *[torch.zeros_like(t) for t in stored])
        assert not exact(x.double()).any()
    _, (rows, scale), exact = float8_dense(factors[1])
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (16, 1)
    torch.testing.assert_close(exact(x.double(), rows, scale), x.double() @ factors[1].double().T, rtol=0.1, atol=0.2)


def test_the_error_is_that_of_the_layer_measured(monkeypatch):
    """A wrong implementation shows in `rel_error`."""
    right = layers.ops.linear_of
    doubled = {"blast": lambda *tensors: 2 * right("blast")(*tensors)}
    monkeypatch.setattr(layers.ops, "linear_of", lambda name: doubled.get(name, right(name)))
    (case,) = cases.shape_cases([(32, 32)], [(4, 4)], 0.5, [3], ["forward"], STRUCTURES)
    rows = layers.bench_case(case, timing.Timer("cpu", 0.01, 3), torch.float32, ("hf_blr",))
    errors = {row["structure"]: row["rel_error"] for row in rows}
    assert errors["blast"] == pytest.approx(1, rel=1e-5) and errors["monarch"] < 1e-5


def test_compiled_rows_where_the_paper_has_them():
    (case,) = cases.paper_cases(["GPT2-S"], [1], ["forward"])[:1]
    wanted = {s.structure + str(s.num_blocks): cases.wanted_impls(case, s, cases.IMPLS) for s in case.specs}
    assert wanted["blast(6, 6)"] == ["hf_blr", "eager", "compiled"] and wanted["blast(4, 4)"] == ["hf_blr"]


def test_first_calls_are_measured_with_nothing_compiled(monkeypatch, tmp_path):
    class Kernel:
        device_caches = {0: "compiled before"}

    seen = []

    def call(function, device):
        seen.append((dict(Kernel.device_caches), os.environ["TRITON_CACHE_DIR"]))
        folder = Path(os.environ["TRITON_CACHE_DIR"]) / "hash"
        folder.mkdir()
        (folder / "kernel").write_text("compiled now")
        (folder / "__grp__kernel.json").write_text(json.dumps({"child_paths": {"kernel": str(folder / "kernel")}}))
        return 1.5

    monkeypatch.setattr(timing, "loaded_kernels", lambda: [Kernel])
    monkeypatch.setattr(layers, "seconds_of", call)
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    (case,) = cases.shape_cases([(32, 32)], [(4, 4)], 0.5, [1], ["forward"], STRUCTURES)
    seconds = layers.first_call_seconds(case, "cpu", torch.float32, keep=tmp_path)
    assert list(seconds.values()) == [1.5] * 4
    assert all(caches == {} and folder != "before" for caches, folder in seen)
    assert len({folder for _, folder in seen}) == 4
    assert os.environ["TRITON_CACHE_DIR"] == "before"
    # the kept kernels are found where they are now
    group = json.loads((tmp_path / "hash" / "__grp__kernel.json").read_text())
    assert Path(group["child_paths"]["kernel"]).read_text() == "compiled now"
    assert [file.name for file in sorted((tmp_path / "hash").iterdir())] == ["__grp__kernel.json", "kernel"]


def test_kernels_that_a_cache_holds_are_left_alone(tmp_path):
    """Another process may have them loaded."""
    for folder in ("new", "cache"):
        (tmp_path / folder / "hash").mkdir(parents=True)
        (tmp_path / folder / "hash" / "launcher.so").write_text(folder)
    held = (tmp_path / "cache" / "hash" / "launcher.so").stat().st_ino
    (tmp_path / "new" / "hash" / "kernel").write_text("new")
    timing.copy_kernels(tmp_path / "new", tmp_path / "cache")
    assert (tmp_path / "cache" / "hash" / "launcher.so").stat().st_ino == held
    assert (tmp_path / "cache" / "hash" / "launcher.so").read_text() == "cache"
    assert (tmp_path / "cache" / "hash" / "kernel").read_text() == "new"


def test_kept_results_are_still_read():
    module = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert "4 x 16" in module["layer_sections"].speed_section()


def test_sizes():
    assert sizes("4096x11008") == (4096, 11008) and sizes("4") == (4, 4)
    with pytest.raises(Exception, match="positive integers"):
        sizes("1x2x3")
