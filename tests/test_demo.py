"""`hf-blr demo` from end to end, on a model that takes no time."""

import argparse
import json
import struct

import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_blr.cli import demo, main
from hf_blr.cli.demo_rows import Demo
from hf_blr.text import load_text, tokenize

#: a group that divides the rows of so small a model, and a budget that pays for its scales
SMALL = ["--seqlen", "64", "--calibration-tokens", "768", "--evaluation-tokens", "384", "--group-size", "16"]
SMALL += ["--bits", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    # a token of zeros, as that for padding is before any training, has gradients without bound
    tiny_llama(num_hidden_layers=7, pad_token_id=None).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def arguments(folder, *more):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--model", str(folder), *SMALL, *more])


def bytes_of_tensors(file):
    with open(file, "rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - header


def test_demo_on_a_few_layers(folder, tmp_path, capsys):
    output = ["--output", str(tmp_path / "demo"), "--json", str(tmp_path / "demo.json")]
    assert main(["demo", "--quick", "--model", str(folder), *SMALL, *output]) == 0
    printed = capsys.readouterr().out
    assert "logits are identical" in printed and "2 of 7 decoder layers" in printed and "'The for statement" in printed
    result = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "low-rank, 80 %", "BLAST, 80 %", "auto, 5 bits", "the same, refined"]
    bits = [row["bits a weight"] for row in rows.values()]
    assert bits[0] == 16 and bits[1:3] == pytest.approx([12.8, 12.8], rel=0.01) and 4.8 < bits[3] == bits[4] <= 5
    assert sorted((row["MB"] for row in rows.values()), reverse=True) == [row["MB"] for row in rows.values()]
    saved = bytes_of_tensors(tmp_path / "demo" / "model.safetensors")
    assert saved / 1e6 == pytest.approx(rows["the same, refined"]["MB"], rel=1e-3)
    worst = max(row["perplexity, own text"] for row in rows.values())
    assert worst < 1.2 * rows["dense"]["perplexity, own text"]
    assert result["settings"]["quick"] and "dense int4" in result["conditions"]


def test_what_is_scored_was_not_fitted_to(folder):
    found = Demo(arguments(folder), tiny_llama(pad_token_id=None), tiny_tokenizer())
    own, unseen = found.texts.values()
    assert found.calibration.shape == (12, 64) and own.shape == unseen.shape == (384,)
    fitted = {tuple(window.tolist()) for window in found.calibration}
    assert fitted.isdisjoint(tuple(window.tolist()) for window in own.view(-1, 64))
    held_out = tokenize(tiny_tokenizer(), load_text("builtin", "test", tiny_tokenizer()))
    assert unseen.tolist() == held_out[:384].tolist()


def test_a_text_of_one_window_is_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("a" * 100)
    short = arguments(folder, "--dataset", str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="short.txt has one window of 64 tokens.*give more text or a smaller --seqlen"):
        Demo(short, tiny_llama(), tiny_tokenizer())
