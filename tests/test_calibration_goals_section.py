"""The goals of calibration beside what was measured, and the default text beside the one before."""

import json

import calibration_goals_section as section
import pytest

TEXTS = {"a": 10.0, "b": 40.0}
SHARED = {"model": "tiny", "structure": None, "blocks": None, "ratio": 1.0, "commit": "1234567890", "seed": 0}
SHARED |= {"calibration": "web", "calibration_tokens": 262144, "calibration_sha256": "c" * 64, "finetune_tokens": 0}
TRAINED = {"finetune_tokens": 8000, "finetune_sha256": "t" * 64}
WHERE = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}


def scored(row, *ratios):
    return [
        {
            **SHARED,
            **row,
            "dataset": text,
            "ppl": ratio * dense,
            "dense_ppl": dense,
            "text_tokens": 9,
            "text_sha256": text,
        }
        for (text, dense), ratio in zip(TEXTS.items(), ratios, strict=True)
    ]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(section, "RESULTS", tmp_path)

    def write(name, rows):
        (tmp_path / name).write_text(json.dumps({"protocol": "p", "environment": WHERE, "rows": rows}))

    encoder = {"model": "mini", "structure": "pivoted", "blocks": None, "ratio": 0.7, "commit": "1234567890"}
    write(
        section.SENTENCES,
        [
            {**encoder, "method": method, "dataset": text, "cosine": cosine, "finetune_tokens": tokens}
            for method, tokens, cosines in (
                ("ours", 0, (0.95, 0.93)),
                ("more", 0, (0.96, 0.93)),
                ("all", 9, (0.98, 0.97)),
                # the same for longer: another model, and no other rows of that one
                ("all", 27, (0.97, 0.97)),
            )
            for text, cosine in zip("ab", cosines, strict=True)
        ],
    )
    return write


def test_each_goal_has_the_best_that_was_measured_and_refined_rows_their_own_dense_one(write):
    pivoted = {"structure": "pivoted", "ratio": 0.8}
    rows = scored({"method": "dense"}, 1.0, 1.0)
    rows += scored({**TRAINED, "method": "dense, refined at 0.1"}, 0.8, 0.8)
    rows += scored({**pivoted, "method": "ours"}, 1.1, 1.3) + scored({**pivoted, "method": "twice"}, 1.21, 1.21)
    rows += scored({**pivoted, **TRAINED, "method": "ours, refined"}, 1.0, 1.0)
    # better, on tokens that no dense model was trained on
    rows += scored({**pivoted, **TRAINED, "finetune_sha256": "o", "method": "twice, refined"}, 0.9, 0.9)
    write(section.FILE, rows)
    lines = {cells[1]: cells[2:5] for line in section.goals_section().splitlines() if (cells := split(line))}
    assert lines["80 %, no training"] == ["1.1", "1.196", "pivoted, ours"]
    assert lines["80 %, no training, the worst of the texts"] == ["1.15", "1.210", "pivoted, twice"]
    assert lines["80 %, refined, over dense refined alike"] == ["1.06", "1.250", "pivoted, ours, refined"]
    assert lines["50 %, no training"][1] == "not measured"
    assert lines["mini, 70 %, cosine"] == ["0.95", "0.9600, 0.9300", "pivoted, more, on a, b"]
    assert lines["mini, 70 %, cosine, refined"][1] == "0.9800, 0.9700"


def split(line):
    return [cell.strip() for cell in line.split("|")]


def test_the_default_text_stands_beside_the_one_before_and_says_its_seconds(write):
    blast = {"structure": "blast", "blocks": [4, 16], "ratio": 0.8, "method": "ours"}
    rows = scored({**blast, "calibration": "builtin", "calibration_tokens": 98304}, 2.0, 2.0)
    rows += scored({**blast, "calibration": "own"}, 1.2, 1.2) + scored({**blast, "method": "ours, refined"}, 1.0, 1.0)
    write(section.FILE, rows)
    written = {"windows": 1024, "seqlen": 2048, "texts": 4, "rounds": 2, "seconds": 61.4, "dtype": "bfloat16"}
    write(section.WRITTEN, [written, {**written, "windows": 2, "seconds": 9.0}])
    found = section.default_text_section()
    own, builtin = (split(line) for line in found.splitlines()[2:4])
    assert own[1:4] == ["the model's own (the default)", "262 thousand tokens", "80 %"] and own[-2] == "1.200"
    assert builtin[1:3] == ["Python's documentation", "98 thousand tokens"] and builtin[-2] == "2.000"
    assert "wrote 2.1 million tokens in 61 s, 2048 texts at once in bfloat16" in found
