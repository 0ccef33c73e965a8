"""The page of accuracy at equal bytes: its lines, the milliseconds of models in bits, and its goals."""

import json

import bits_section
import bits_times_section
import pytest
import structures_in_int4_section

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
    for module in (bits_section, bits_times_section, structures_in_int4_section):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    auto = {**AUTO, "taken": {"dense int4": 20, "low_rank int4": 10}}
    rows = [row for each in (SHARED, FACTORS, INT4, WHOLE) for row in scored(each, 1.0, 4.0)]
    rows += scored(auto, 1.0, 2.25) + scored(FACTORS, 1.0, 1.0, basis="") + scored({**WHOLE, "seed": 1}, 9.0)
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    head = {"protocol": "p", "environment": where}
    (tmp_path / "bits_h200.json").write_text(json.dumps({**head, "rows": rows}))

    def timed(variant, ms, bits=16, measurement="prefill", tokens=1024, kept=1000):
        # 500 numbers beside those of projections
        sizes = {"model": "large", "projection_parameters": kept, "weight_bytes": 1000 + 125 * bits}
        return {**sizes, "variant": variant, "batch": 1, "measurement": measurement, "tokens": tokens, "ms": ms}

    models = [timed("dense/int4+fused", 3.0, 4.125), timed("dense", 8.0), timed("dense+attention", 7.0)]
    models += [timed("dense", 4.0, measurement="decode", tokens=1), timed("dense", 1.0, tokens=64)]
    models += [timed("blast:4x4/fp8", 6.0, 6.5, kept=800), timed("blast:4x4/fp8+fused", 5.0, 6.5, kept=800)]
    models += [{**timed("dense", 0.1), "model": "other"}, {**timed("dense", 0.1), "error": "failed"}]
    (tmp_path / "models_h200.json").write_text(json.dumps({**head, "rows": models}))
    decode = [timed("dense/int4+fused", 2.0, 4.125, measurement="decode", tokens=1)]
    (tmp_path / "decode_h200.json").write_text(json.dumps({**head, "rows": decode}))
    return tmp_path


def cells(section):
    head, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    names = [name.strip() for name in head.split("|")[1:-1]]
    return [dict(zip(names, (cell.strip() for cell in line.split("|")[1:-1]), strict=True)) for line in lines]


def test_lines_stand_by_their_bits_with_the_mean_of_all_texts(results):
    lines = cells(bits_section.bits_section())
    assert [(line["bits"], line["layers"], line["stored in"]) for line in lines] == [
        ("16.00", "dense", "plain"),
        ("12.75", "low_rank", "plain"),
        ("4.25", "dense", "int4, groups of 64"),
        ("3.49", "auto", "20 dense int4, 10 low_rank int4"),
        ("3.39", "low_rank", "int4, groups of 64"),
    ]
    assert not any(line["trained on"] for line in lines)
    auto = lines[3]
    assert auto["a"] == "10.00 (1.00x)" and auto["b"] == "90.00 (2.25x)" and auto["mean"] == "1.500"


def test_what_is_best_at_its_bits_is_that_as_fitted_or_refined(results):
    file = results / "bits_h200.json"
    result = json.loads(file.read_text())
    refined = {**WHOLE, "method": "GPTQ, refined", "finetune_tokens": 1000}
    result["rows"] += scored(refined, 1.0, 1.21) + scored({**FACTORS, "method": "ours, refined"}, 1.5, 1.5)
    file.write_text(json.dumps(result))
    lines = [tuple(line.values()) for line in cells(bits_section.best_section())]
    assert lines == [
        ("4.25", "27 %", "dense in int4, groups of 64", "2.000", "1.100"),
        ("3.49", "22 %", "auto", "1.500", ""),
        ("3.39", "21 %", "low_rank 80 % in int4, groups of 64", "2.000", ""),
    ]


def test_what_all_read_is_no_column(results):
    assert "fitted to" not in cells(bits_section.bits_section())[0]
    file = results / "bits_h200.json"
    result = json.loads(file.read_text())
    result["rows"] += scored({**INT4, "calibration": "other", "calibration_sha256": "d" * 64}, 1.0, 1.0)
    file.write_text(json.dumps(result))
    assert {line["fitted to"][:5] for line in cells(bits_section.bits_section())} == {"", "web: ", "other"}


def test_beside_a_k_quant_stands_the_best_of_no_more_bits(results):
    found = {line["K-quant"]: line for line in cells(bits_section.k_quants_section())}
    # 210 bytes of 256 numbers, and 84
    assert found["Q6_K"]["bits"] == "6.56" and found["Q2_K"]["bits"] == "2.62"
    fit, refined = "best fit of no more bits", "best refined of no more bits"
    assert found["Q6_K"][fit] == found["Q4_K"][fit] == "auto, 3.49 bits, mean 1.500"
    assert found["Q3_K"][fit] == "low_rank 80 % in int4, groups of 64, 3.39 bits, mean 2.000"
    assert found["Q2_K"][fit] == found["Q6_K"][refined] == "not measured"


def test_what_int4_costs_each_structure_stands_beside_low_rank(results):
    file = results / "bits_h200.json"
    result = json.loads(file.read_text())
    blast = {"structure": "blast", "blocks": [4, 4], "bits": 3.5}
    result["rows"] += scored({**INT4, **blast}, 1.5, 3.0)
    for row in result["rows"]:
        row["ppl"] *= 1.1 if (row["structure"], row["format"]) == ("low_rank", "int4") else 1
    file.write_text(json.dumps(result))
    found = {line["layers"]: line for line in cells(structures_in_int4_section.structures_section())}
    assert (found["low_rank"]["a"], found["low_rank"]["bits"], found["low_rank"]["group"]) == ("1.100", "3.39", "64")
    assert found["blast 4x4"]["b"] == "not measured"
    # 1.5 and 3 times dense, low-rank 1.1 and 4.4 times
    assert found["blast 4x4"]["over low-rank"] == "0.964" and found["low_rank"]["over low-rank"] == "1.000"


def test_what_is_fitted_to_a_mixture_stands_apart(results):
    file = results / "bits_h200.json"
    before = (
        bits_section.bits_section(),
        bits_section.k_quants_section(),
        structures_in_int4_section.structures_section(),
    )
    result = json.loads(file.read_text())
    mixed = {**INT4, "calibration": "40 % code, 60 % web", "calibration_sha256": "d" * 64}
    trained = {"method": "ours, refined", "finetune_tokens": 1000, "finetune_mixture": "10 % code, 90 % web"}
    result["rows"] += scored(mixed, 1.0, 1.0) + scored({**mixed, **trained}, 0.9, 0.9)
    file.write_text(json.dumps(result))
    lines = cells(bits_section.mixture_section())
    assert [(line["layers"], line["fitted to"][:1], line["trained on"][-1:], line["mean"]) for line in lines] == [
        ("dense", "", "", "2.000"),
        ("low_rank", "A", "B", "0.900"),
        ("low_rank", "A", "", "1.000"),
    ]
    after = (
        bits_section.bits_section(),
        bits_section.k_quants_section(),
        structures_in_int4_section.structures_section(),
    )
    assert before == after


def test_models_in_bits_stand_by_their_bits_with_their_fastest_forms(results):
    lines = cells(bits_times_section.times_section())
    shown = [tuple(line[name] for name in ("model", "layers", "stored in", "kept", "bits")) for line in lines]
    assert shown == [
        ("large", "dense", "plain", "100 %", "16.00"),
        ("large", "blast 4x4", "fp8", "80 %", "6.50"),
        ("large", "dense", "int4", "100 %", "4.12"),
    ]
    assert [line["prefill, ms"] for line in lines] == ["7.00", "5.00", "3.00"]
    # of a file of its own
    assert [line["decode, ms"] for line in lines] == ["4.00", "", "2.00"]


def test_what_is_kept_makes_lines_of_their_own_and_what_is_fused_does_not(results):
    file = results / "models_h200.json"
    result = json.loads(file.read_text())
    blast = next(row for row in result["rows"] if row["variant"].startswith("blast") and row["tokens"] == 1024)
    less = {"weight_bytes": 1, "projection_parameters": blast["projection_parameters"] // 2}
    fused = {**blast, "variant": "blast:4x4/fp8+fused", "ms": 4.5}
    result["rows"] += [fused, {**blast, **less, "variant": "blast:4x4@8/fp8"}]
    file.write_text(json.dumps(result))
    lines = [line for line in cells(bits_times_section.times_section()) if line["layers"] == "blast 4x4"]
    assert [(line["kept"], line["prefill, ms"]) for line in lines] == [("80 %", "4.50"), ("40 %", "6.00")]


def test_without_a_model_in_bits_all_are_shown(results):
    models = json.loads((results / "models_h200.json").read_text())
    models["rows"] = [row for row in models["rows"] if "/" not in row["variant"]]
    for file, found in (("models_h200.json", models), ("decode_h200.json", {**models, "rows": []})):
        (results / file).write_text(json.dumps(found))
    assert [line["model"] for line in cells(bits_times_section.times_section())] == ["large", "other"]


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
    assert found["low-rank 80 % in int8, over plain, refined"] == "not measured"


def test_refined_models_stand_beside_plain_ones_that_were_trained_on_the_same_text(results):
    file = results / "bits_h200.json"
    result = json.loads(file.read_text().replace('"a"', '"wikitext2"').replace('"web"', '"valid"'))
    plain = [row for row in result["rows"] if (row["structure"], row["format"]) == ("low_rank", "plain")]
    for stored, text, share in (("plain", "x", 0.9), ("int8", "x", 0.909), ("fp8", "y", 0.9), ("int8", "y", 0.5)):
        trained = {"method": "ours, refined", "finetune_tokens": 1000, "finetune_sha256": text, "format": stored}
        result["rows"] += [{**row, **trained, "ppl": share * row["ppl"]} for row in plain]
    file.write_text(json.dumps(result))
    found = {line["perplexity"]: line["measured"] for line in cells(bits_section.goals_section())}
    assert found["low-rank 80 % in int8, over plain, refined"] == "1.0 %"
    assert found["low-rank 80 % in fp8, over plain, refined"] == "not measured"
