"""The tables of perplexities, and refinement where `datasets` is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import quality_sections

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


def write(results, rows):
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    (results / "quality.json").write_text(json.dumps({"protocol": "p", "environment": where, "rows": rows}))


def row_of(structure, blocks, method, ratio, text, ppl, commit="1234567890"):
    scored = {"model": "tiny", "bytes": 2e6, "fit_seconds": 1.0, "dataset": text, "ppl": ppl, "commit": commit}
    return {**scored, "structure": structure, "blocks": blocks, "method": method, "ratio": ratio}


def lines_of(section):
    """The cells of each line of the table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]


def test_each_size_has_one_line_with_all_texts(results):
    square = "blast", [16, 16], "ours"
    write(
        results,
        [
            row_of(*square, 0.5, "test", 30.5),
            row_of(*square, 0.5, "ptb", 180.25),
            row_of(*square, 0.8, "test", 20.5, "abcdef0123"),
            row_of("blast", [16, 16], "ours, refined", 0.5, "test", 22.25),
            row_of("low_rank", None, "ours", 0.5, "test", 31.5),
            row_of("blast", [4, 16], "ours", 0.5, "test", 1.0),
        ],
    )
    section = quality_sections.quality_section()
    heads, _, large, small = lines_of(section)
    found = dict(zip(heads, small, strict=True))
    assert found["kept"] == "50 %" and found["BLAST 16x16"] == "30.50 / 180" and found["low-rank"] == "31.50"
    assert found["BLAST 16x16, refined"] == "22.25" and found["pivoted"] == ""
    # the caption names the commit of most rows, and the line of another names its own
    assert "commit 1234567, 2026-01-01" in section and large[-1] == "abcdef0" and found["other commit"] == ""


def test_shapes_stand_beside_each_other_as_fitted(results):
    kinds = (("blast", [4, 16]), ("blast", [16, 4]), ("low_rank", None))
    rows = [row_of(*kind, "ours", ratio, "test", 20.0) for kind in kinds for ratio in (0.8, 0.5, 0.3)]
    write(results, [*rows, row_of("monarch", [4, 4], "ours, refined", 0.5, "test", 1.0)])
    assert lines_of(quality_sections.shapes_section())[2:] == [
        ["blast 4 x 16", "20.00", "20.00"],
        ["blast 16 x 4", "20.00", "20.00"],
        ["low_rank", "20.00", "20.00"],
    ]


def test_the_parts_of_the_fit_come_in_their_order(results):
    of = {"ours": 3.0, "+ Fisher": 5.0, "whitened SVD": 9.0, "plain SVD": 2e8, "another": 1.0}
    rows = [row_of("low_rank", None, method, 0.5, "test", ppl) for method, ppl in of.items()]
    write(results, [*rows, row_of("blast", [4, 16], "activations", 0.5, "test", 8.0)])
    heads, _, *lines = lines_of(quality_sections.ladder_section())
    low_rank, blast = heads.index("low-rank, 50 %"), heads.index("BLAST 4x16, 50 %")
    assert [line[low_rank] for line in lines] == ["2e+08", "9.00", "5.00", "3.00"]
    assert [line[blast] for line in lines] == ["", "8.00", "", ""]
