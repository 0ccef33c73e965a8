"""The page of accuracy at equal bytes: its lines, its milliseconds and its goals."""

import json

import bits_section
import pytest

TEXTS = {"a": 10.0, "b": 40.0}
SHARED = {"structure": None, "blocks": None, "ratio": 1.0, "kept": 1.0, "commit": "1234567890", "format": "plain"}
SHARED |= {"calibration": None, "calibration_tokens": 0, "seed": None, "bits": 16.0, "method": "dense"}
FITTED = {"calibration": "web", "calibration_tokens": 262144, "calibration_sha256": "c" * 64, "seed": 0}
FACTORS = {**SHARED, **FITTED, "structure": "low_rank", "ratio": 0.8, "kept": 0.797, "bits": 12.75, "method": "ours"}
INT4 = {**FACTORS, "format": "int4", "group_size": 64, "bits": 3.39}
WHOLE = {**INT4, "structure": "dense", "ratio": 1.0, "kept": 1.0, "bits": 4.25, "method": "GPTQ"}
AUTO = {**WHOLE, "structure": "auto", "method": "ours", "format": "chosen", "bits": 3.49, "bits_per_weight": 3.5}


def scored(row, *ratios, basis=", turned"):
    """Its rows on the texts, of these ratios to dense."""
    return [
        {**row, "model": f"tiny{basis}", "dataset": text, "ppl": ratio * ppl, "dense_ppl": ppl}
        | {"text_tokens": 30000, "text_sha256": text * 64}
        for (text, ppl), ratio in zip(TEXTS.items(), ratios, strict=False)
    ]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(bits_section, "RESULTS", tmp_path)
    auto = {**AUTO, "taken": {"dense int4": 20, "low_rank int4": 10}}
    rows = [row for each in (SHARED, FACTORS, INT4, WHOLE) for row in scored(each, 1.0, 4.0)]
    rows += scored(auto, 1.0, 2.25) + scored(FACTORS, 1.0, 1.0, basis="") + scored({**WHOLE, "seed": 1}, 9.0)
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    head = {"protocol": "p", "environment": where}
    (tmp_path / "bits_h200.json").write_text(json.dumps({**head, "rows": rows}))

    def timed(variant, ms, measurement="prefill", tokens=1024, **more):
        return (
            {"model": "large", "variant": variant, "batch": 1, "measurement": measurement, "tokens": tokens}
            | more
            | {"ms": ms}
        )

    models = [timed("dense", 8.0), timed("dense", 4.0, "decode", 1), timed("dense", 3.0, format="int4")]
    models += [
        timed("low_rank", 6.0, ratio=0.8),
        timed("low_rank+fused", 5.0, ratio=0.8),
        timed("dense", 1.0, tokens=64),
    ]
    models += [{**timed("dense", 0.1), "model": "other"}, {**timed("dense", 0.1), "error": "failed"}]
    (tmp_path / "models_h200.json").write_text(json.dumps({**head, "rows": models}))
    return tmp_path


def cells(section):
    head, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    names = [name.strip() for name in head.split("|")[1:-1]]
    return [dict(zip(names, (cell.strip() for cell in line.split("|")[1:-1]), strict=True)) for line in lines]


def test_lines_stand_by_their_bits_with_the_mean_of_all_texts_and_the_milliseconds_of_their_form(results):
    lines = cells(bits_section.bits_section())
    assert [(line["bits"], line["layers"], line["stored in"]) for line in lines] == [
        ("16.00", "dense", "plain"),
        ("12.75", "low_rank", "plain"),
        ("4.25", "dense", "int4, groups of 64"),
        ("3.49", "auto", "20 dense int4, 10 low_rank int4"),
        ("3.39", "low_rank", "int4, groups of 64"),
    ]
    auto = lines[3]
    assert auto["a"] == "10.00 (1.00x)" and auto["b"] == "90.00 (2.25x)" and auto["mean"] == "1.500"
    assert [line["prefill, ms"] for line in lines] == ["8.00", "5.00", "3.00", "", ""]
    assert [line["decode, ms"] for line in lines] == ["4.00", "", "", "", ""]
    assert "Milliseconds: large, a text of 1024 tokens" in bits_section.bits_section()


def test_without_a_time_in_bits_there_are_no_milliseconds(results):
    models = json.loads((results / "models_h200.json").read_text())
    models["rows"] = [row for row in models["rows"] if "format" not in row]
    (results / "models_h200.json").write_text(json.dumps(models))
    assert "prefill, ms" not in cells(bits_section.bits_section())[0]
    assert "Milliseconds" not in bits_section.bits_section()


def test_goals_stand_beside_what_was_measured_and_what_was_not_says_so(results):
    file = results / "bits_h200.json"
    result = json.loads(file.read_text().replace('"a"', '"wikitext2"').replace('"web"', '"valid"'))
    result["rows"] += [
        {**row, "format": "int8", "ppl": 1.002 * row["ppl"]}
        for row in result["rows"]
        if (row["structure"], row["format"]) == ("low_rank", "plain")
    ]
    result["rows"] += [
        {**row, "method": "ours, refined", "finetune_tokens": 1000, "ppl": 0.9 * row["ppl"]}
        for row in result["rows"]
        if row["structure"] == "auto"
    ]
    file.write_text(json.dumps(result))
    found = {line["perplexity"]: line["measured"] for line in cells(bits_section.goals_section())}
    assert found["auto, 3.5 bits"] == "10.00" and found["auto, 3.5 bits, refined"] == "9.00"
    assert found["auto, 4.25 bits"] == found["low-rank 80 % in fp8, over plain"] == "not measured"
    assert found["low-rank 80 % in int8, over plain"] == "0.2 %"
