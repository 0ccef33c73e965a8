"""The text that the quality benchmark has its model write: what it draws windows from, again with the same seed."""

import json
from pathlib import Path

import own_text
import protocol
import pytest
import torch
from calibration_sets import Calibration, Mixture
from protocol import read_ids, sha256_of
from tiny import EOS_ID, tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(protocol, "SEQLEN", 32)
    monkeypatch.setattr(protocol, "BATCH", 4)
    return tmp_path


def written(folder, seed, name, *more):
    out = folder / name
    arguments = ["--model", str(folder / "model"), "--windows", "12", "--seed", str(seed), "--device", "cpu"]
    own_text.main([*arguments, "--out", str(out), "--json", str(folder / "own_text.json"), *more])
    return read_ids([str(out)], None)["own"]


def test_it_is_a_part_of_calibration_sets_and_comes_again_with_its_seed(folder):
    first, again, other = (written(folder, seed, name) for seed, name in ((0, "a.pt"), (0, "b.pt"), (1, "c.pt")))
    assert first.shape == (12, 32) and first.dtype == torch.int32
    # four texts a window
    assert (first[:, [0, 8, 16, 24]] == EOS_ID).all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    on = Calibration.draw(tiny_llama(), {"own": first}, Mixture.parse(["own"]), 0, 8, 32)
    assert on.counts == {"own": 8} and on.windows.unique(dim=0).shape == (8, 32)
    rows = json.loads((folder / "own_text.json").read_text())["rows"]
    assert [row["sha256"] for row in rows] == [sha256_of(windows) for windows in (first, again, other)]
    assert [(row["windows"], row["seqlen"], row["seed"]) for row in rows] == [(12, 32, 0), (12, 32, 0), (12, 32, 1)]
    assert all(row["seconds"] > 0 and row["dtype"] == "bfloat16" for row in rows)


def test_rounds_have_seeds_of_their_own_and_what_is_done_in_time_is_kept(folder):
    first, other = written(folder, 0, "a.pt").chunk(2)
    assert not torch.equal(first, other)
    assert torch.equal(written(folder, 0, "b.pt", "--seconds", "0"), first)
    assert torch.equal(written(folder, 1, "c.pt", "--windows", "6", "--rounds", "1"), other)
    rows = json.loads((folder / "own_text.json").read_text())["rows"]
    assert [(row["windows"], row["rounds"]) for row in rows] == [(12, 2), (6, 1), (6, 1)]


def test_texts_go_on_from_pieces_of_parts_in_their_shares(folder):
    torch.save({"a": torch.arange(24), "b": torch.arange(100, 148)}, folder / "parts.pt")
    begin = ["--parts", str(folder / "parts.pt"), "--begin-with", "a=0.25", "b=0.75", "--begin-tokens", "3"]
    written(folder, 0, "a.pt", *begin, "--name", "own", "--rounds", "2")
    pieces = read_ids([str(folder / "a.pt")], None)["own"].view(-1, 8)[:, :3]
    # 48 texts: 12 pieces of a, which has 8, and 36 of b, which has 16
    counts = {first: int((pieces[:, 0] == first).sum()) for first in [*range(0, 24, 3), *range(100, 148, 3)]}
    assert sorted(counts[first] for first in range(0, 24, 3)) == [1] * 4 + [2] * 4
    assert sorted(counts[first] for first in range(100, 148, 3)) == [2] * 12 + [3] * 4
    assert (pieces.diff() == 1).all()
    row = json.loads((folder / "own_text.json").read_text())["rows"][0]
    assert (row["begun_with"], row["begin_tokens"]) == ("25 % a, 75 % b", 3)


def test_the_tokens_that_are_kept_are_those_of_the_last_row():
    file = Path(own_text.__file__).parent / "results" / "own_text.json"
    row = json.loads(file.read_text())["rows"][-1]
    kept = read_ids([str(file.with_suffix(".pt"))], None)["own"]
    assert sha256_of(kept) == row["sha256"] and kept.shape == (row["windows"], row["seqlen"])
