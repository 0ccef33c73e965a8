"""The table of ratios to dense: its means, its spread over seeds, and the fair row beside refined ones."""

import json

import means_section
import pytest
import text_ratio_sections
from text_ratio_sections import lettered_lines, ratio_lines, text_ratio_section

TEXTS = ["a", "b"]
DENSE_PPL = {"a": 10.0, "b": 40.0}
SHARED = {"model": "tiny", "structure": None, "blocks": None, "ratio": 1.0, "commit": "1234567890"}
SHARED |= {"calibration": None, "calibration_tokens": 0, "seed": None, "finetune_tokens": 0}
FITTED = {"calibration": "web", "calibration_tokens": 262144, "calibration_sha256": "c" * 64, "seed": 0}
OURS = {**SHARED, **FITTED, "structure": "blast", "blocks": [4, 4], "ratio": 0.5, "method": "ours, refined"}


def scored(row, *ratios):
    """Its rows on the texts, of these ratios to dense."""
    return [
        {**row, "dataset": text, "ppl": ratio * DENSE_PPL[text], "dense_ppl": DENSE_PPL[text]}
        | {"text_tokens": 30000, "text_sha256": text * 64}
        for text, ratio in zip(TEXTS, ratios, strict=False)
    ]


def test_the_mean_is_geometric_over_texts_and_seeds_and_the_worst_is_the_largest_of_all():
    rows = scored(OURS, 1.0, 4.0) + scored({**OURS, "seed": 1}, 2.0, 4.5)
    (line,) = ratio_lines(rows, TEXTS)
    # means 2 and 3 of the two seeds
    assert line["mean"] == "2.449 ± 0.500" and line["worst"] == "4.500"
    assert line["a"] == "14.14 (1.41x)" and line["layers"] == "blast 4x4" and line["kept"] == "50 %"
    (line,) = ratio_lines(scored(OURS, 1.0, 4.0), TEXTS)
    assert line["mean"] == "2.000"


def test_calibration_sets_are_not_mixed_up_and_half_scored_runs_are_left_out():
    other = {**OURS, "calibration": "own"}
    rows = scored(OURS, 2.0, 2.0) + scored(other, 1.0, 1.0) + scored({**other, "seed": 1}, 9.0)
    best, worse = ratio_lines(rows, TEXTS)
    (again,) = ratio_lines(scored({**OURS, "calibration_repeated": 45056}, 1.0, 4.0), TEXTS)
    assert again["fitted to"] == "web: 262 thousand tokens, 45 thousand tokens of them again"
    assert best["fitted to"] == "own: 262 thousand tokens" and best["mean"] == "1.000" and worse["mean"] == "2.000"


def test_refined_rows_are_divided_by_the_best_dense_model_refined_on_the_same_tokens():
    tokens = {"finetune_tokens": 8000, "finetune_sha256": "t" * 64}
    dense = {**SHARED, **FITTED, **tokens}
    rows = scored({**dense, "method": "dense, refined at 1"}, 1.5, 1.5)
    rows += scored({**dense, "method": "dense, refined at 0.1"}, 0.8, 0.8)
    rows += scored({**dense, "method": "dense, refined at 0.1", "calibration": "own", "finetune_sha256": "o"}, 0.1, 0.1)
    rows += scored({**dense, "method": "dense, refined at 0.03", "finetune_tokens": 16000}, 0.1, 0.1)
    # fitted to more text than the dense model's row names, and trained on the same
    rows += scored({**OURS, **tokens, "calibration_tokens": 524288}, 1.0, 1.0)
    rows += scored({**OURS, "method": "ours"}, 1.2, 1.2)
    lines = {line["method"]: line.get("of dense refined") for line in ratio_lines(rows, TEXTS)}
    assert lines["ours, refined"] == "1.250"
    assert {name for name, fair in lines.items() if fair} == {"ours, refined"}
    trained = {line["method"]: line["trained on"] for line in ratio_lines(rows, TEXTS)}
    assert trained["ours, refined"] == "8 thousand tokens" and trained["ours"] == ""


def test_a_dense_model_that_was_trained_on_the_mixtures_other_windows_gives_an_estimate():
    tokens = {"finetune_tokens": 8000, "finetune_sha256": "t", "finetune_batch": 4, "finetune_mixture": "half, half"}
    dense = {**SHARED, **FITTED, **tokens, "method": "dense, refined at 0.1", "finetune_sha256": "o"}
    rows = scored(dense, 0.5, 0.5) + scored({**OURS, **tokens}, 1.0, 1.0)
    assert quotient(rows) == "≈ 2.000"
    # of the very same tokens, it is none
    assert quotient(rows + scored({**dense, "finetune_sha256": "t"}, 0.8, 0.8)) == "1.250"
    for other in ({"finetune_batch": 8}, {"finetune_tokens": 16000}, {"finetune_mixture": "all"}):
        assert quotient(scored({**dense, **other}, 0.5, 0.5) + scored({**OURS, **tokens}, 1.0, 1.0)) is None


def quotient(rows):
    """What the table says of the refined model over the dense one."""
    return next(line for line in ratio_lines(rows, TEXTS) if line["method"] == "ours, refined").get("of dense refined")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(text_ratio_sections, "RESULTS", tmp_path)
    return tmp_path


def test_the_section_says_which_tokens_were_scored_and_fitted_to(results):
    rows = scored({**SHARED, "method": "dense"}, 1.0, 1.0) + scored(OURS, 1.5, 1.5)
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    (results / "quality_h200.json").write_text(json.dumps({"protocol": "p", "environment": where, "rows": rows}))
    section = text_ratio_section()
    assert section.splitlines()[2].startswith("| 100 % |           | dense ")
    assert "a (30 thousand tokens, aaaaaaaa); b (30 thousand tokens, bbbbbbbb)" in section
    assert "web: 262 thousand tokens, seed 0 (cccccccc)" in section and "card, torch 2, commit 1234567" in section


def test_mixtures_have_letters_and_the_caption_says_which(results):
    mixed = {**OURS, "calibration": "40 % own, 60 % web"}
    rows = scored(OURS, 1.5, 1.5) + scored(mixed, 1.2, 1.2) + scored({**mixed, "method": "ours"}, 1.3, 1.3)
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    (results / "quality_h200.json").write_text(json.dumps({"protocol": "p", "environment": where, "rows": rows}))
    section = text_ratio_section()
    cells = [[cell.strip() for cell in line.split("|")] for line in section.splitlines() if line[:3] == "| 5"]
    assert [line[4] for line in cells] == ["A", "A", "web: 262 thousand tokens"]
    assert "Mixture A: 40 % own, 60 % web: 262 thousand tokens. " in section


def test_sizes_of_one_method_stand_in_one_line_and_what_loses_most_is_first():
    rows = scored({**OURS, "method": "ours"}, 2.0, 2.0) + scored({**OURS, "method": "ours", "ratio": 0.8}, 1.1, 1.1)
    rows += scored({**OURS, "method": "ours", "ratio": 0.8, "seed": 1}, 1.2, 1.2)
    rows += scored({**OURS, "method": "theirs"}, 4.0, 4.0) + scored({**OURS, "ratio": 0.8}, 1.5, 1.5)
    lines = means_section.by_size(ratio_lines(rows, TEXTS))
    assert [(line["method"], line["80 %"], line["50 %"]) for line in lines] == [
        ("theirs", "", "4.000"),
        ("ours", "1.149 ± 0.050", "2.000"),
        ("ours, refined", "1.500", ""),
    ]
    assert list(lines[0])[-3:] == ["80 %", "50 %", "commit"]


def test_the_letters_of_mixtures_are_those_of_the_first_table(tmp_path, monkeypatch):
    """Also where a mixture comes first in a row of the dense model, which only that table shows."""
    mixed = {**SHARED, **FITTED, "calibration": "50 % a, 50 % b", "method": "dense, refined at 1"}
    rows = scored({**mixed, "finetune_tokens": 8000, "finetune_sha256": "t"}, 0.9, 0.9)
    rows += scored({**OURS, "calibration": "50 % c, 50 % d"}, 2.0, 2.0)
    environment = {"device": "a card", "torch": "2", "commit": "1234567", "date": "2026-01-01"}
    (tmp_path / "q.json").write_text(json.dumps({"rows": rows, "environment": environment, "protocol": "tokens"}))
    monkeypatch.setattr(means_section, "RESULTS", tmp_path)
    assert "| B " in means_section.means_section("q.json")


def test_a_mixture_that_is_only_trained_on_has_a_letter_too():
    tokens = {"finetune_tokens": 8000, "finetune_sha256": "t" * 64}
    mixed = {**OURS, "calibration": "50 % a, 50 % b", "method": "ours, refined", **tokens}
    rows = scored({**mixed, "finetune_mixture": "50 % c, 50 % d"}, 2.0, 2.0)
    rows += scored({**mixed, "method": "ours, same", "finetune_mixture": "50 % a, 50 % b"}, 3.0, 3.0)
    lines, letters = lettered_lines(rows, list(TEXTS))
    assert [line["fitted to"] for line in lines] == ["A", "A"] and letters["50 % c, 50 % d"] == "B"
    assert [line["trained on"] for line in lines] == ["8 thousand tokens of B", "8 thousand tokens"]
