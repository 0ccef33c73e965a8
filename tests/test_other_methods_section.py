"""Other papers' methods beside ours: what was fitted to the same windows, and whether ours is better throughout."""

import json

import other_methods_section as section
import pytest

TEXTS = {"a": 10.0, "b": 40.0}
CALIBRATION, TOKENS = section.FITTED_TO
SHARED = {"model": "tiny", "structure": "low_rank", "blocks": None, "ratio": 0.8, "commit": "1234567890", "seed": 0}
SHARED |= {"calibration": CALIBRATION, "calibration_tokens": TOKENS, "calibration_sha256": "c" * 64}
OURS = {"structure": "pivoted", "method": "ours"}


def scored(row, *ratios):
    return [
        {**SHARED, **row, "dataset": text, "ppl": ratio * dense, "dense_ppl": dense}
        for (text, dense), ratio in zip(TEXTS.items(), ratios, strict=True)
    ]


@pytest.fixture
def said(tmp_path, monkeypatch):
    monkeypatch.setattr(section, "RESULTS", tmp_path)

    def said(rows):
        where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
        (tmp_path / section.FILE).write_text(json.dumps({"protocol": "p", "environment": where, "rows": rows}))
        return section.other_methods_section()

    return said


def test_what_others_lose_is_a_multiple_of_what_ours_loses_on_the_same_windows(said):
    rows = scored(OURS, 1.1, 1.2) + scored({"method": "SVD-LLM with update"}, 1.3, 1.4)
    rows += scored({**OURS, "seed": 1}, 1.1, 1.3)
    rows += scored({"method": "MoDeGPT at 0.1", "structure": None}, 1.5, 1.1)
    # of other text, and trained
    rows += scored({"method": "SVD-LLM with update", "calibration": "web"}, 1.0, 1.0)
    rows += scored({**OURS, "finetune_tokens": 9}, 1.0, 1.0)
    found = said(rows)
    cells = [[cell.strip() for cell in line.split("|")] for line in found.splitlines() if line.startswith("|")]
    assert cells[2][1:6] == ["80 %", "pivoted", "ours", "1.10x", "1.25x"] and "±" in cells[2][6]
    assert [row[3] for row in cells[2:]] == ["ours", "MoDeGPT", "SVD-LLM"]
    assert "- At 80 % SVD-LLM loses more on every text: 2.0 to 3.0 times what ours loses." in found
    assert "- At 80 % MoDeGPT loses no more than ours on b." in found
    assert found.count("- At") == 2 and CALIBRATION in found
