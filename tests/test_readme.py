"""What the README promises: tables come from result files, and its quickstart runs."""

import json
import re
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


def test_blast_is_at_or_below_low_rank_at_equal_parameters():
    rows = {row["model"]: row for row in json.loads((ROOT / "benchmarks/results/demo.json").read_text())["rows"]}
    assert rows["blast"]["parameters (M)"] <= rows["low_rank"]["parameters (M)"] * 1.01
    assert rows["blast"]["perplexity"] <= rows["low_rank"]["perplexity"]


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
