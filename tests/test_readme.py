"""What the README promises: tables come from result files, and its quickstart and the examples run."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model_folder(tmp_path):
    # the README and the examples use windows of up to 2048 tokens
    tiny_llama(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_tables_of_readme_and_docs_are_those_of_the_result_files():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run python benchmarks/readme.py"


def test_every_result_file_says_where_it_was_measured():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        environment = json.loads(file.read_text())["environment"]
        assert all(environment.get(key) for key in ("device", "torch", "commit", "date")), file.name


def test_blast_is_below_low_rank_at_equal_bytes():
    rows = json.loads((ROOT / "benchmarks/results/front_h200.json").read_text())["rows"]
    found = {(row["row"], row["kept"]): row for row in rows}
    for kept in (0.5, 0.8):
        blast, low_rank = found["BLAST 4x4", kept], found["low-rank", kept]
        assert blast["mb"] <= low_rank["mb"] * 1.01
        assert all(blast["ppl"][text] < low_rank["ppl"][text] for text in low_rank["ppl"])


@pytest.mark.slow
def test_the_quickstart_runs(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"## Quickstart\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(code.strip().splitlines()) <= 12
    changed = code.replace("HuggingFaceTB/SmolLM2-135M", model_folder).replace('"wikitext2"', '"builtin"')
    # the tokenizer of the test has a token a byte: sixteen windows are text enough
    changed = changed.replace('dataset="builtin")', 'dataset="builtin", num_samples=16)')
    changed = changed.replace('tokenizer, "builtin")', 'tokenizer, "builtin", max_windows=2)')
    exec(changed, {})
    assert "perplexity" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arguments, shown",
    [
        ("quickstart.py", ["--seqlen", "128"], "blast: "),
        ("finetune_trainer.py", ["--steps", "2", "--seqlen", "64"], "train_loss"),
    ],
)
def test_examples_run(name, arguments, shown, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--model", model_folder, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert shown in capsys.readouterr().out
