"""The quality benchmark: its runs, its rows, and what it refuses."""

import argparse
import json

import merge
import protocol
import pytest
import quality
import runs
import runs_in_bits
import torch
from calibration_sets import Calibration, Mixture
from tiny import tiny_llama, tiny_tokenizer

import hf_blr.linear

#: one block, as runs are many
SIZE = {"num_hidden_layers": 1}
WINDOWS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
TEXTS = ("wikitext2", "ptb", "c4", "code")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_llama(**SIZE).save_pretrained(tmp_path / "model")
    texts = {name: WINDOWS.flatten()[10 * i : 100 + 10 * i].int() for i, name in enumerate(TEXTS)}
    torch.save(texts, tmp_path / "texts.pt")
    torch.save({"valid": WINDOWS.flatten().int(), "own": WINDOWS.flip(0).int()}, tmp_path / "parts.pt")
    monkeypatch.setattr(protocol, "SEQLEN", 32)
    monkeypatch.setattr(protocol, "BATCH", 4)
    monkeypatch.setattr(protocol, "WINDOWS", 8)
    monkeypatch.setattr(quality, "EPOCHS", 2)
    monkeypatch.setattr(quality, "DESCENT_STEPS", 3)
    monkeypatch.setattr(runs_in_bits, "GROUP", 8)
    return tmp_path


def measure(folder, *more, json_name="q.json", texts="texts.pt"):
    """The rows of the file after a run of the benchmark."""
    arguments = ["--model", str(folder / "model"), "--texts", str(folder / texts), "--parts", str(folder / "parts.pt")]
    if "--calibration" not in more:
        arguments += ["--calibration", "valid"]
    quality.main([*arguments, "--device", "cpu", "--json", str(folder / json_name), *more])
    return json.loads((folder / json_name).read_text())["rows"]


@pytest.mark.slow
def test_every_kind_of_run_writes_its_rows_and_none_runs_twice(folder, capsys):
    rows = measure(folder, "--only", "*0.5 *", "1 dense*")
    labels = {(row["method"], row["structure"], tuple(row["blocks"] or ()), row["ratio"]) for row in rows}
    wanted = {(r.method, r.structure, tuple(r.blocks or ()), r.ratio) for r in runs.runs() if r.ratio in (0.5, 1.0)}
    # 32 x 32 blocks of the narrow layers would keep more than half
    assert wanted - labels == {("ours", "blast", (32, 32), 0.5)} and ("dense", None, (), 1.0) in labels
    assert "blast 32x32 0.5 ours: model.layers.0.self_attn.k_proj" in capsys.readouterr().out
    fields = "model dataset structure method ratio kept ppl dense_ppl parameters bytes fit_seconds seed calibration"
    assert all(set(fields.split()) <= set(row) for row in rows)
    refined = [row for row in rows if row["method"] == runs.REFINED]
    assert refined[0]["finetune_tokens"] == 2 * 256 and {row["dataset"] for row in refined} == set(TEXTS)
    capsys.readouterr()
    assert len(measure(folder, "--only", "low_rank 0.5 *")) == len(rows)
    assert "low_rank 0.5" not in capsys.readouterr().out


def test_rows_say_on_which_tokens_they_are(folder):
    rows = measure(folder, "--calibration", "valid=0.5", "own=0.5", "--only", "low_rank 0.5 plain SVD", "*whitened SVD")
    texts = torch.load(folder / "texts.pt")
    for row in rows:
        scored = texts[row["dataset"]][:96]
        assert row["text_tokens"] == 96 and row["text_sha256"] == protocol.sha256_of(scored)
    whitened, plain = (
        next(row for row in rows if row["method"] == method and row["ratio"] == 0.5)
        for method in ("whitened SVD", "plain SVD")
    )
    assert whitened["calibration"] == "50 % own, 50 % valid" and whitened["calibration_tokens"] == 256
    assert whitened["calibration_windows"] == {"valid": 4, "own": 4} and len(whitened["calibration_sha256"]) == 64
    # what reads no text says so
    assert (plain["calibration"], plain["calibration_tokens"], plain.get("calibration_sha256")) == (None, 0, None)


def test_more_windows_to_train_on_than_to_fit_to(folder, monkeypatch):
    sizes = ["--windows", "4", "--train-windows", "16", "--train-tokens", "1600"]
    sizes += ["--train-batch", "4", "--train-rate", "0.002"]
    given, refine = [], quality.refine
    monkeypatch.setattr(quality, "refine", lambda *args, **how: given.append(how) or refine(*args, **how))
    rows = measure(folder, *sizes, "--only", "1 dense, refined at 0.1", "low_rank 0.5 ours", "low_rank 0.5 ours, *")
    assert {row["calibration_tokens"] for row in rows if row["method"] != "dense"} == {128}
    trained = {row["method"]: row for row in rows if row["finetune_tokens"]}
    # three times 16 windows of 32 come nearest to 1600 tokens
    assert {row["finetune_tokens"] for row in trained.values()} == {1536}
    assert len({row["finetune_sha256"] for row in trained.values()}) == 1
    assert trained.keys() == {runs.REFINED, "dense, refined at 0.1"}
    assert all((how["batch_size"], how["learning_rate"]) == (4, 0.002) for how in given) and len(given) == 2
    assert all((row["finetune_batch"], row["learning_rate"]) == (4, 0.002) for row in trained.values())


def test_of_several_rates_the_best_on_held_out_windows_is_trained_with(folder):
    """Tried on a share of the tokens, from one fit, which the trials leave as it was."""
    runs_wanted = ["--only", "low_rank 0.5 ours", "low_rank 0.5 ours, refined", "1 dense, refined at 0.1"]
    sizes = [
        "--windows",
        "4",
        "--train-windows",
        "32",
        "--train-tokens",
        "1024",
        "--train-batch",
        "4",
        "--held-out",
        "4",
    ]
    sizes += ["--calibration", "valid=0.5", "own=0.5"]
    rates = ["--train-rate", "1e-5", "0.003", "30", "--trial-tokens", "512"]
    chosen = {row["method"]: row for row in measure(folder, *sizes, *rates, *runs_wanted) if row["dataset"] == "ptb"}
    row = chosen[runs.REFINED]
    assert row["rates_tried"].keys() == {"1e-05", "0.003", "30"} and row["rate_tokens"] == 512
    tried = {float(rate): divergence for rate, divergence in row["rates_tried"].items()}
    assert row["learning_rate"] == 0.003 == min(tried, key=tried.get)
    assert row["divergence"] < tried[0.003] < row["divergence_before"]
    # as if that rate had been named
    named = measure(folder, *sizes, "--train-rate", "0.003", *runs_wanted, json_name="named.json")
    assert row["ppl"] == next(r["ppl"] for r in named if (r["method"], r["dataset"]) == (runs.REFINED, "ptb"))
    dense = chosen["dense, refined at 0.1"]
    assert (
        dense["finetune_sha256"] == row["finetune_sha256"] and dense["rates_tried"].keys() == row["rates_tried"].keys()
    )
    with pytest.raises(SystemExit):
        measure(folder, *sizes[:-5], *rates, json_name="none.json")


def test_rows_that_were_trained_on_more_tokens_are_others(folder):
    sizes = ["--windows", "4", "--train-windows", "16", "--only", "low_rank 0.5 ours, refined"]
    for tokens in ("512", "512", "1024"):
        rows = measure(folder, *sizes, "--train-tokens", tokens)
    # and the same number of them is not trained on twice
    assert [row["finetune_tokens"] for row in rows if row["dataset"] == "ptb"] == [0, 512, 1024]
    # as many of another mixture are others
    for _ in range(2):
        rows = measure(folder, *sizes, "--train-tokens", "512", "--train-mixture", "own")
    assert [row.get("finetune_mixture") for row in rows if row["dataset"] == "ptb"] == [None, "valid", "valid", "own"]
    merge.main([str(folder / "all.json"), str(folder / "q.json")])
    assert json.loads((folder / "all.json").read_text())["rows"] == rows


def test_a_part_with_less_than_its_share_is_trained_on_again():
    parts = {"own": torch.arange(1000).view(100, 10), "code": 2000 + torch.arange(30).view(3, 10)}
    mixture = Mixture.parse(["own=0.5", "code=0.5"])
    found = Calibration.draw(None, parts, mixture, 0, 16, 10, 16)
    assert len(found.windows) == 8 and found.counts["code"] <= 3
    code = found.training[found.training[:, 0] >= 2000, 0]
    # whole before any of it comes again
    assert sorted(torch.bincount((code - 2000) // 10).tolist()) == [2, 3, 3]
    own = found.training[found.training[:, 0] < 1000, 0]
    assert len(own.unique()) == len(own) == 8
    again = Calibration.draw(None, parts, mixture, 0, 16, 10, again=True)
    assert again.counts == {"own": 8, "code": 8} and again.facts()["calibration_repeated"] == 5 * 10
    assert found.facts()["calibration_repeated"] == 0


def test_one_run_compares_calibration_sets_and_seeds(folder):
    sets = ["--calibration", "valid", "--calibration", "valid=0.5", "own=0.5"]
    rows = measure(folder, *sets, "--seeds", "0", "1", "--only", "low_rank 0.5 ours")
    fitted = [row for row in rows if row["method"] == "ours" and row["dataset"] == "ptb"]
    assert {(row["calibration"], row["seed"]) for row in fitted} == {
        (name, seed) for name in ("valid", "50 % own, 50 % valid") for seed in (0, 1)
    }
    assert len({row["calibration_sha256"] for row in fitted}) == len({row["ppl"] for row in fitted}) == 4


def test_a_model_larger_than_it_says_is_refused(folder):
    texts = torch.load(folder / "texts.pt")
    bench = protocol.Bench("tiny", tiny_llama(), texts)
    facts = {"method": "m", "ratio": 0.5}
    with pytest.raises(ValueError, match="m keeps 1.0000 of the projections, not 0.5"):
        bench.rows(bench.dense, facts)
    total = sum(bench.targets.values())
    (row, *_) = bench.rows(bench.dense, facts, kept=total // 2)
    everything = sum(p.numel() for p in bench.dense.parameters())
    assert row["kept"] == 0.5 and row["parameters"] == everything - total // 2
    assert row["bytes"] == 2 * row["parameters"]


def test_rows_in_bits_say_what_is_stored(folder, capsys):
    only = ["--only", "dense 1 GPTQ in int4", "low_rank 0.8 ours", "low_rank 0.8 ours in int8", "auto 4.25 bits ours"]
    rows = measure(folder, *only, "--turned")
    assert {row["model"] for row in rows} == {"model, turned"}
    found = {(row["structure"], row["format"]): row for row in rows if row["dataset"] == "ptb" and row["structure"]}
    assert found.keys() == {("dense", "int4"), ("low_rank", "plain"), ("low_rank", "int8"), ("auto", "chosen")}
    # a code, the eighth part of a scale of 16 bits, and two numbers a layer for its shape
    assert 6 < found["dense", "int4"]["bits"] < 6.05 and found["dense", "int4"]["kept"] == 1
    # eight bits have one scale a row
    for form, least, most in (("plain", 15.9, 16.1), ("int8", 8, 9)):
        row = found["low_rank", form]
        assert least < row["bits"] / row["kept"] < most and row["kept"] <= 0.8 and row["group_size"] is None
    shared = found["auto", "chosen"]
    assert 4 < shared["bits"] <= 4.25 == shared["bits_per_weight"] and sum(shared["taken"].values()) <= 7
    dense = next(row for row in rows if row["method"] == "dense")
    assert dense["bits"] == 16
    saved = dense["bytes"] - found["dense", "int4"]["bytes"]
    numbers = sum(protocol.Bench("m", tiny_llama(**SIZE), {}).targets.values())
    assert 8 * saved == pytest.approx((16 - found["dense", "int4"]["bits"]) * numbers)
    capsys.readouterr()
    assert measure(folder, *only, "--turned") == rows and "ours in int8" not in capsys.readouterr().out


def test_factors_that_are_rounded_between_train_on_half_of_the_text_each_time(folder, monkeypatch):
    trained = []

    def refine(model, dense, windows, **settings):
        trained.append((windows, {module.storage.name for module in hf_blr.linear.blr_modules(model).values()}))

    monkeypatch.setattr(quality, "refine", refine)
    rows = measure(folder, "--only", "low_rank 0.8 ours, rounded between, refined in int4")
    (first, before), (second, after) = trained
    assert before == {"plain"} and after == {"int4"}
    assert torch.cat([first, second]).shape == (8, 32) and not torch.equal(first, second)
    row = rows[-1]
    assert row["format"] == "int4" and row["bits"] < 6 and row["finetune_tokens"] == 2 * 8 * 32


def test_more_bits_than_a_row_claims_are_refused(folder):
    bench = protocol.Bench("tiny", tiny_llama(), torch.load(folder / "texts.pt"))
    with pytest.raises(ValueError, match="m stores 16.0000 bits a weight, not 15.9"):
        bench.rows(bench.dense, {"method": "m", "ratio": 1.0, "bits_per_weight": 15.9})


def test_other_tokens_under_a_name_do_not_go_into_the_same_file(folder):
    measure(folder, "--only", "low_rank 0.5 plain SVD")
    torch.save({"wikitext2": WINDOWS.flatten()[1:101]}, folder / "other.pt")
    with pytest.raises(ValueError, match="text model wikitext2 stands for two different"):
        measure(folder, "--only", "low_rank 0.5 plain SVD", texts="other.pt")
    measure(folder, "--only", "low_rank 0.5 plain SVD", texts="other.pt", json_name="r.json")
    with pytest.raises(ValueError, match="stands for two different sequences"):
        merge.main([str(folder / "all.json"), str(folder / "q.json"), str(folder / "r.json")])
    assert not (folder / "all.json").exists()
    measure(folder, "--only", "low_rank 0.5 whitened SVD")
    torch.save({"valid": WINDOWS.flip(1)}, folder / "parts.pt")
    with pytest.raises(ValueError, match="calibration model valid 256 0 stands for two"):
        measure(folder, "--only", "low_rank 0.5 whitened SVD")


def test_shards_share_the_runs_by_whole_families():
    every = runs.runs()
    parts = [runs.shard(every, (i, 3)) for i in (1, 2, 3)]
    assert sorted(run.label for part in parts for run in part) == sorted(run.label for run in every)
    families = [{run.family for run in part} for part in parts]
    assert not families[0] & families[1] and not families[1] & families[2] and not families[0] & families[2]
    assert runs.shard(every, (1, 1)) == every
    for bad in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to n"):
            runs.shard_of(bad)


def test_a_refined_run_comes_right_after_its_fit():
    every = runs.runs()
    refined = [i for i, run in enumerate(every) if run.kind == "refine"]
    assert refined
    for i in refined:
        assert every[i - 1].family == every[i].family and every[i - 1].kind == "compress"
        assert every[i].method == f"{every[i - 1].method}, refined"


def test_shards_merge_to_the_whole_and_measured_rows_stay(folder):
    only = ["--only", "low_rank 0.[58] ours", "low_rank 0.5 ours, refined"]
    parts = [measure(folder, *only, "--shard", f"{i}/2", json_name=f"part{i}.json") for i in (1, 2)]
    assert [len({(r["method"], r["ratio"]) for r in rows} - {("dense", 1.0)}) for rows in parts] == [1, 2]
    merge.main([str(folder / "all.json"), *(str(folder / f"part{i}.json") for i in (1, 2))])
    whole = json.loads((folder / "all.json").read_text())
    assert len(whole["rows"]) == len(parts[0]) + len(parts[1]) - len(TEXTS)  # the dense model
    merge.main([str(folder / "all.json"), str(folder / "part2.json")])
    assert json.loads((folder / "all.json").read_text()) == whole
    other = {**whole, "environment": {**whole["environment"], "device": "another"}}
    (folder / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="merge those of one device"):
        merge.main([str(folder / "all.json"), str(folder / "other.json")])


def test_marks_are_undone(tmp_path):
    (tmp_path / "t").write_text("a well @-@ known 1 @,@ 000 and 3 @.@ 5 @ home")
    assert protocol.plain(tmp_path / "t") == "a well-known 1,000 and 3.5 @ home"


def test_sources_are_texts_and_files_of_ids(tmp_path):
    (tmp_path / "t").write_text("abc")
    torch.save({"ids": torch.arange(3)}, tmp_path / "i.pt")
    found = protocol.read_ids([f"text={tmp_path / 't'}", str(tmp_path / "i.pt")], tiny_tokenizer())
    assert {name: ids.tolist() for name, ids in found.items()} == {
        "text": tiny_tokenizer()("abc")["input_ids"],
        "ids": [0, 1, 2],
    }


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="'t' needs 2048 tokens at least, got 512"):
        protocol.Bench("tiny", tiny_llama(), {"t": WINDOWS.flatten()})
