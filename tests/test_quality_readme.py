"""The README's table of perplexities, and refinement where `datasets` is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import quality_sections
from quality_sections import square_blast

REFINE = """
import copy, sys
sys.modules["datasets"] = sys.modules["matplotlib"] = None
import torch
from tiny import tiny_llama
from hf_blr import BLRConfig, compress
from hf_blr.finetune import refine
dense, windows = tiny_llama(), torch.arange(128).view(4, 32)
model = copy.deepcopy(dense)
compress(model, BLRConfig("low_rank", ratio=0.5), calibration=list(windows.split(2)), progress=False)
refine(model, dense, windows, epochs=1, batch_size=2)
"""


@pytest.mark.slow
def test_refinement_needs_no_datasets_package():
    # in a process of its own: transformers remembers which packages it has seen
    subprocess.run([sys.executable, "-c", REFINE], check=True, cwd=Path(__file__).parent)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_sections, "RESULTS", tmp_path)
    return tmp_path


def test_each_method_has_one_line_with_all_texts(results):
    shared = {"model": "tiny", "structure": "blast", "blocks": [4, 16], "method": "ours", "bytes": 2e6}
    rows = [
        {**shared, "ratio": ratio, "dataset": text, "ppl": ppl, "fit_seconds": 1.0, "commit": commit}
        for ratio, text, ppl, commit in (
            (0.5, "test", 30.5, "1234567890"),
            (0.5, "ptb", 80.25, "1234567890"),
            (0.8, "test", 20.5, "abcdef0123"),
        )
    ]
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    (results / "quality.json").write_text(json.dumps({"protocol": "p", "environment": where, "rows": rows}))
    for section in (quality_sections.quality_section(), quality_sections.quality_rows_section()):
        check(section)


def check(section):
    assert "commit 1234567, 2026-01-01" in section
    lines = [line for line in section.splitlines() if "blast" in line]
    assert len(lines) == 2 and "80 %" in lines[0] and "50 %" in lines[1]
    assert "30.5" in lines[1] and "80.25" in lines[1] and "4 x 16" in lines[1]
    # the caption names the commit of most rows, and the line of another names its own
    assert "abcdef0" in lines[0] and section.count("abcdef0") == 1 and section.count("1234567") == 1


def test_square_blast_stands_beside_low_rank_and_gaps_are_shown():
    kinds = (("blast", [16, 16], "ours", 20.5), ("low_rank", None, "ours", 150.25), ("blast", [4, 16], "ours", 1.0))
    rows = [
        {"structure": structure, "blocks": blocks, "method": method, "ratio": 0.5, "dataset": text, "ppl": ppl}
        for structure, blocks, method, ppl in kinds
        for text in ("test", "ptb")
    ]
    # one text of two is not enough
    rows.append({**rows[0], "method": "ours, refined"})
    (line,) = square_blast(rows)
    assert list(line.values()) == ["50 %", "-, -", "20.50 / 20.50, 150 / 150", "-, -", "-, -", "-, -", ""]
