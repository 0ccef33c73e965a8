"""The quality benchmark: its baselines, its rows, and the refinement that it measures."""

import argparse
import copy
import json

import baselines
import merge
import protocol
import pytest
import quality
import torch
from tiny import tiny_llama

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.dense import dense_weight
from hf_blr.factorize import relative_error
from hf_blr.finetune import refine
from hf_blr.ops import blast_linear, low_rank_linear, monarch_linear
from hf_blr.structures import FACTOR, Blast

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def test_descent_recovers_a_planted_matrix():
    spec = Blast(32, 24, 4, (4, 2))
    generator = torch.Generator().manual_seed(0)
    planted = {name: torch.randn(2, *shape, generator=generator) for name, shape in spec.shapes(FACTOR).items()}
    weights = baselines.dense_of(planted)
    factors = baselines.preconditioned_descent(weights, Blast(32, 24, 6, (4, 2)), steps=300)
    for weight, found in zip(weights, baselines.dense_of(factors), strict=True):
        assert relative_error(weight, found) < 0.02


def test_the_update_of_u_lowers_the_error_on_the_compressed_models_inputs():
    dense = tiny_llama()
    batches = list(WINDOWS.split(4))
    statistics = collect_statistics(dense, BLRConfig("low_rank", ratio=0.4), calibration=batches)
    off = BLRConfig("low_rank", ratio=0.4, sequential=False, fisher=False)
    plain = copy.deepcopy(dense)
    compress(plain, off, statistics=statistics, progress=False)
    updated = baselines.svd_llm_updated(dense, 0.4, statistics, batches)
    name = "model.layers.0.self_attn.q_proj"
    # nothing was compressed before the first layers: their answer is whitened SVD's
    torch.testing.assert_close(
        updated.get_submodule(name).dense_weight(), plain.get_submodule(name).dense_weight(), rtol=1e-2, atol=1e-3
    )
    name, inputs = "model.layers.1.mlp.down_proj", []
    handle = updated.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            updated(batch)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    weight = dense_weight(dense.get_submodule(name))
    errors = [relative_error(weight, m.get_submodule(name).dense_weight(), rows.T @ rows) for m in (updated, plain)]
    assert errors[0] < errors[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    texts = {"valid": WINDOWS.flatten(), "wikitext2": WINDOWS.flatten()[:100], "ptb": WINDOWS.flatten()[50:]}
    torch.save({name: ids.int() for name, ids in texts.items()}, tmp_path / "ids.pt")
    for module in (protocol, quality):
        monkeypatch.setattr(module, "SEQLEN", 32, raising=False)
    monkeypatch.setattr(protocol, "BATCH", 4)
    monkeypatch.setattr(quality, "EPOCHS", 2)
    monkeypatch.setattr(quality, "DESCENT_STEPS", 3)
    return tmp_path


@pytest.mark.slow
def test_every_kind_of_run_writes_its_rows_and_none_runs_twice(folder, capsys):
    arguments = ["--model", str(folder / "model"), "--ids", str(folder / "ids.pt"), "--json", str(folder / "q.json")]
    arguments += ["--device", "cpu"]
    quality.main([*arguments, "--only", "* 0.5 *"])
    rows = json.loads((folder / "q.json").read_text())["rows"]
    labels = {(row["method"], row["structure"], tuple(row["blocks"] or ()), row["ratio"]) for row in rows}
    wanted = {(r.method, r.structure, tuple(r.blocks or ()), r.ratio) for r in quality.runs() if r.ratio == 0.5}
    # 32 x 32 blocks of the narrow layers would keep more than half
    assert wanted - labels == {("ours", "blast", (32, 32), 0.5)} and ("dense", None, (), 1.0) in labels
    assert "blast 32x32 0.5 ours: model.layers.0.self_attn.k_proj" in capsys.readouterr().out
    fields = "model dataset protocol structure method ratio ppl dense_ppl parameters bytes fit_seconds"
    assert all(set(fields.split()) <= set(row) for row in rows)
    refined = [row for row in rows if row["method"] == quality.REFINED]
    assert refined[0]["finetune_tokens"] == 2 * 256 and {row["dataset"] for row in refined} == {"wikitext2", "ptb"}
    capsys.readouterr()
    quality.main([*arguments, "--only", "low_rank 0.5 *"])
    assert "low_rank 0.5" not in capsys.readouterr().out
    assert len(json.loads((folder / "q.json").read_text())["rows"]) == len(rows)


def test_shards_share_the_runs_by_whole_families():
    every = quality.runs()
    parts = [quality.shard(every, (i, 3)) for i in (1, 2, 3)]
    assert sorted(run.label for part in parts for run in part) == sorted(run.label for run in every)
    families = [{run.family for run in part} for part in parts]
    assert not families[0] & families[1] and not families[1] & families[2] and not families[0] & families[2]
    assert quality.shard(every, (1, 1)) == every
    for bad in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to n"):
            quality.shard_of(bad)


def test_a_refined_run_comes_right_after_its_fit():
    every = quality.runs()
    refined = [i for i, run in enumerate(every) if run.kind == "refine"]
    assert refined
    for i in refined:
        assert every[i - 1].family == every[i].family and every[i - 1].kind == "compress"
        assert every[i].method == f"{every[i - 1].method}, refined"


def test_shards_merge_to_the_whole_and_measured_rows_stay(folder):
    arguments = ["--model", str(folder / "model"), "--ids", str(folder / "ids.pt"), "--device", "cpu", "--only"]
    arguments += ["low_rank 0.[58] ours", "low_rank 0.5 ours, refined"]
    for i in (1, 2):
        quality.main([*arguments, "--shard", f"{i}/2", "--json", str(folder / f"part{i}.json")])
    parts = [json.loads((folder / f"part{i}.json").read_text())["rows"] for i in (1, 2)]
    assert [len({(r["method"], r["ratio"]) for r in rows} - {("dense", 1.0)}) for rows in parts] == [1, 2]
    merge.main([str(folder / "all.json"), *(str(folder / f"part{i}.json") for i in (1, 2))])
    whole = json.loads((folder / "all.json").read_text())
    assert len(whole["rows"]) == len(parts[0]) + len(parts[1]) - 2  # the dense model, on two texts
    merge.main([str(folder / "all.json"), str(folder / "part2.json")])
    assert json.loads((folder / "all.json").read_text()) == whole
    other = {**whole, "environment": {**whole["environment"], "device": "another"}}
    (folder / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="merge those of one device"):
        merge.main([str(folder / "all.json"), str(folder / "other.json")])


def test_marks_are_undone(tmp_path):
    (tmp_path / "t").write_text("a well @-@ known 1 @,@ 000 and 3 @.@ 5 @ home")
    assert protocol.plain(tmp_path / "t") == "a well-known 1,000 and 3.5 @ home"


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="needs 16384 tokens at least, got 256"):
        protocol.Bench("tiny", tiny_llama(), {"calibration": WINDOWS.flatten()})


def test_refinement_lowers_the_loss_and_trains_factors_only():
    dense = tiny_llama()
    model = tiny_llama()
    config = BLRConfig("blast", ratio=0.5, num_blocks=2, allocation="uniform")
    compress(model, config, calibration=list(WINDOWS.split(4)), progress=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    history = refine(model, dense, WINDOWS, epochs=10, batch_size=4, learning_rate=3e-3)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith((".u", ".s", ".v")), name


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_refinement_trains_the_targets_that_were_left_dense(rate):
    model, left, never = tiny_llama(), "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
    config = BLRConfig("low_rank", ratio=0.5, allocation="uniform", modules_to_not_convert=[never])
    compress(model, config, calibration=list(WINDOWS.split(4)), progress=False)
    model.set_submodule(left, model.get_submodule(left).to_dense())
    before = {name: p.clone() for name, p in model.named_parameters()}
    refine(model, tiny_llama(), WINDOWS, epochs=1, batch_size=4, dense_rate=rate)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert (f"{left}.weight" in moved) == (rate > 0)
    assert all(name.endswith((".u", ".v")) for name in moved - {f"{left}.weight"})


@pytest.mark.parametrize("structure", ["low_rank", "monarch", "blast"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_by_the_dense_matrix_have_the_references_values_and_gradients(structure, bias):
    linear = {"low_rank": low_rank_linear, "monarch": monarch_linear, "blast": blast_linear}[structure]
    shapes = {
        "low_rank": [(6, 3), (3, 8)],
        "monarch": [(2, 3, 4), (2, 4, 4)],
        "blast": [(2, 3, 3), (2, 2, 3), (2, 3, 4)],
    }[structure]
    generator = torch.Generator().manual_seed(0)
    results = []
    for impl in ("reference", "dense"):
        generator.manual_seed(0)
        given = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(2, 5, 8), *shapes, (6,)]]
        given = [t.requires_grad_() for t in given]
        out = linear(*given[:-1], given[-1] if bias else None, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), given if bias else given[:-1])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
