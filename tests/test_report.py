"""`hf-blr report`: what the tables say, and the page in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_blr.bench.report.cells import sort_value
from hf_blr.bench.report.conditions import kind_of, protocol_of, where_of
from hf_blr.bench.report.files import read_result, write_result
from hf_blr.bench.report.layer_plots import form_of
from hf_blr.bench.report.layer_tables import layer_lines
from hf_blr.bench.report.model_tables import by_size, compared
from hf_blr.bench.report.page import page
from hf_blr.bench.report.quality_tables import usable
from hf_blr.bench.report.sections import QUESTIONS
from hf_blr.bench.report.summary import Summary, summarised
from hf_blr.bench.report.tables import Table, tables
from hf_blr.cli import main

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
ENVIRONMENT = {"date": "2026-11-22", "device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "commit": "0123456789"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def model_row(variant, ms, form="graph", measurement="prefill", **more):
    row = {"model": "Llama-7B", "variant": variant, "measurement": measurement, "batch": 1, "tokens": 1024}
    sizes = {
        "parameters": 7_000_000,
        "weight_bytes": 14_000_000,
        "peak_bytes": 20_000_000 if variant == "dense" else 10_000_000,
    }
    return {**row, **sizes, "form": form, "ms": ms, **more}


MODELS = {
    "environment": ENVIRONMENT,
    "dtype": "bfloat16",
    "protocol": "medians",
    "rows": [
        model_row("blast:4x4", 6.0),
        model_row("dense", 10.0),
        model_row("dense", 9.0, "compiled", mode="default"),
        model_row("dense", 8.0, measurement="decode", tokens=1, tokens_per_second=125.0),
        model_row("blast:4x4", 4.0, measurement="decode", tokens=1, tokens_per_second=250.0),
        {"model": "Llama-7B", "variant": "dense", "measurement": "storage", "disk_bytes": 14e9, "load_s": 3.0},
        {"model": "DiT-XL/2", "variant": "dense", "measurement": "build", "error": "ImportError: <b>diffusers</b>"},
    ],
}
QUALITY = {
    "environment": ENVIRONMENT,
    "rows": [
        {
            "model": "m",
            "dataset": "wikitext2",
            "structure": s,
            "ratio": r,
            "ppl": p,
            "dense_ppl": 17.6,
            "bytes": int(r * 1e8),
        }
        for s, r, p in (("blast", 0.8, 31.0), ("blast", 0.5, 105.0), ("low_rank", 0.8, 40.0))
    ],
}


@pytest.fixture
def files(tmp_path):
    write_result(tmp_path / "models.json", MODELS)
    write_result(tmp_path / "quality.json", QUALITY)
    return [str(RESULTS / "layers_h100.json"), str(RESULTS / "demo.json"), *map(str, sorted(tmp_path.glob("*.json")))]


def test_each_variant_is_compared_with_denses_fastest_form():
    dense, blast = compared(MODELS["rows"], "prefill")
    assert (dense["variant"], dense["form"], dense["speed over dense"]) == ("dense", "compiled, default", 1)
    assert blast["speed over dense"] == 1.5 and blast["peak / dense"] == 0.5
    decode = compared(MODELS["rows"], "decode")[1]
    assert decode["tokens/s"] == 250 and decode["speed over dense"] == 2 and "tokens" not in decode
    # without a dense row there is nothing to compare with
    assert compared(MODELS["rows"][:1], "prefill")[0]["speed over dense"] is None


def test_of_fused_and_not_the_faster_counts():
    rows = [model_row(v, ms) for v, ms in (("dense", 8.0), ("blast:4x4", 5.0), ("blast:4x4+fused", 4.0))]
    rows += [model_row("low_rank+fused", 3.0), model_row("low_rank", 2.0), model_row("dense", 1.0, batch=8)]
    rows += [model_row("dense", 9.0, "compiled", measurement="training", activation_budget=0.5)]
    found = by_size(rows, "prefill")
    assert list(found) == [("Llama-7B", "1 x 1024"), ("Llama-7B", "8 x 1024")]
    assert {name: row["variant"] for name, row in found["Llama-7B", "1 x 1024"].items()} == {
        "dense": "dense",
        "blast:4x4": "blast:4x4+fused",
        "low_rank": "low_rank",
    }
    assert list(by_size(rows, "training")) == [("Llama-7B", "1 x 1024, 50 % of activations kept")]
    assert list(by_size(MODELS["rows"][:5], "decode")) == [("Llama-7B", "1 x 1")]


def test_kinds_of_files():
    assert [kind_of(r) for r in (MODELS, QUALITY)] == ["models", "quality"]
    assert kind_of(read_result(RESULTS / "layers_h100.json")) == "layers"
    assert kind_of(read_result(RESULTS / "demo.json")) is None and kind_of({"rows": []}) is None
    assert kind_of(read_result(RESULTS / "groups_h100.json")) == "groups"
    titles = [table.title for table in tables("x", MODELS)]
    assert titles == [
        "Speed of whole models",
        "Prefill of whole models",
        "Decoding of whole models",
        "Models on disk",
        "Whole models: predicted and measured",
        "What failed",
    ]
    # what a file does not know is no column, nor is a model that all rows share
    (table,) = tables("q", QUALITY)
    assert table.columns == ["kept", "structure", "MB", "wikitext2 ppl"] and table.note == "Dense: wikitext2 17.60."
    two = {**QUALITY, "rows": [*QUALITY["rows"], QUALITY["rows"][0] | {"model": "n"}]}
    assert tables("q", two)[0].columns[0] == "model" and len(tables("q", two)[0].rows) == 4


def test_layer_tables_show_the_rows_of_the_file():
    result = read_result(RESULTS / "layers_h100.json")
    table = tables("layers", result)[0]
    row = next(r for r in table.rows if (r["layer"], r["structure"], r["blocks"]) == ("q,k,v,o", "blast", "4 x 4"))
    measured = [
        r["speedup_vs_dense"]
        for r in result["rows"]
        if (r["model"], r["layer"], r["structure"], r["blocks"], r["tokens"], r["direction"], r["impl"])
        == ("Llama-7B", "q,k,v,o", "blast", [4, 4], 1024, "forward", "hf_blr")
    ]
    assert row["1024 tokens"] == f"{measured[0]:.2f}x"


def test_layer_tables_and_plots_tell_formats_apart():
    row = {"model": "", "layer": "q", "blocks": [1, 1], "tokens": 1024, "direction": "forward", "impl": "hf_blr"}
    dense = row | {"structure": "dense", "rank": 64, "impl": "cublas", "us": 8.0, "speedup_vs_dense": 1.0}
    rows = [dense, dense | {"format": "fp8", "us": 4.0, "speedup_vs_dense": 2.0}]
    for name, speed in (("plain", 2.0), ("fp8", 4.0)):
        rows.append(row | {"structure": "low_rank", "rank": 16, "format": name, "speedup_vs_dense": speed})
    lines = layer_lines([row | {"commit": "c"} for row in rows])
    shown = [(line["structure"], line["format"], line["1024 tokens"]) for line in lines]
    assert shown == [
        ("dense", "plain", 8.0),
        ("dense", "fp8", "2.00x"),
        ("low_rank", "plain", "2.00x"),
        ("low_rank", "fp8", "4.00x"),
    ]
    assert "format" not in layer_lines([{**dense, "commit": "c"}])[0]
    assert [form_of(row) for row in rows] == ["dense", "dense fp8", "low_rank", "low_rank fp8"]


def test_conditions_name_machine_versions_and_commit():
    assert protocol_of(MODELS) == "bfloat16. medians."
    assert where_of(MODELS) == "NVIDIA H100 80GB HBM3, torch 2.11.0, commit 0123456, 2026-11-22."
    # each table says so itself
    assert all(table.where == where_of(MODELS) and table.card == ENVIRONMENT["device"] for table in tables("x", MODELS))


def test_rows_of_another_commit_are_marked_in_the_row():
    later = "fedcba9876"
    rows = [
        model_row("dense", 8.0),
        model_row("low_rank", 4.0),
        model_row("pivoted", 5.0),
        model_row("blast:4x4", 6.0, commit=later),
        model_row("dense", 9.0, batch=8, commit=later),
        model_row("low_rank", 3.0, batch=8),
    ]
    wide, long, *_ = tables("x", {**MODELS, "rows": rows})
    assert "commit 0123456" in long.where and "fedcba9" not in long.where
    marks = [(row["batch"], row["variant"], row["other commit"]) for row in long.rows]
    # a speed is of two rows
    assert [mark for mark in marks if mark[2]] == [
        (1, "blast:4x4", "fedcba9"),
        (8, "dense", "fedcba9"),
        (8, "low_rank", "fedcba9"),
    ]
    assert [row["other commit"] for row in wide.rows] == ["fedcba9", "fedcba9"]
    # where all rows are of one, there is no such column
    assert all("other commit" not in table.columns for table in tables("x", MODELS))


def test_what_cells_sort_by():
    words = ["10581f1", "2026-01-31", "blast 4x4", "BLAST 4 x 4"]
    assert [sort_value(word) for word in words] == words
    cells = {"1.65x*": 1.65, "0.27 (0.4)": 0.27, "4 x 16": 4, "50 %": 50, "1.59x -> 2.00x": 1.59, "-3": -3}
    assert {cell: sort_value(cell) for cell in cells} == cells
    assert sort_value(None) == sort_value(float("nan")) == "" and sort_value(1e-05) == 1e-05


def test_a_line_of_many_commits_counts_them():
    rows = [model_row("dense", 8.0, commit=f"{i}{i}{i}{i}{i}{i}{i}{i}", batch=i) for i in range(1, 8)]
    rows += [row | {"form": "compiled", "mode": "default"} for row in rows]
    table = next(table for table in tables("x", {**MODELS, "rows": rows}) if "predicted" in table.title)
    assert [row["other commit"] for row in table.rows] == ["6 others"]


def test_rows_of_no_kind_say_once_what_they_share():
    rows = [
        {"study": "s", "ms": ms, "sizes": [4, 16], "parts": {"a": 1}, "commit": c * 40}
        for ms, c in ((1.0, "a"), (2, "b"))
    ]
    (table,) = tables("x", {"environment": ENVIRONMENT, "rows": rows})
    assert table.note == "In all rows: study s, sizes 4 x 16." and table.columns == ["ms", "other commit"]
    assert table.rows == [{"ms": 1.0, "other commit": ""}, {"ms": 2, "other commit": "bbbbbbb"}]
    # a field that a later release added, with nothing in it
    (table,) = tables("x", {"environment": ENVIRONMENT, "rows": [rows[0], {**rows[1], "group_size": None}]})
    assert table.note == "In all rows: study s, sizes 4 x 16." and table.columns == ["ms", "other commit"]
    # one row alone shares nothing
    (table,) = tables("x", {"environment": ENVIRONMENT, "rows": rows[:1]})
    assert table.note == "" and table.columns == ["study", "ms", "sizes"]


def test_the_summary_says_how_small_how_fast_and_how_much_worse():
    quality = {
        **QUALITY,
        "rows": [
            {"model": "small", "dataset": "d", "structure": s, "blocks": b, "ratio": 0.5, "ppl": p, "bytes": 1e8}
            | {"dense_ppl": 17.6, "method": "ours"}
            for s, b, p in (("low_rank", None, 31.0), ("blast", [4, 4], 29.0), ("monarch", [4, 4], 35.0))
        ],
    }
    rows = [model_row("low_rank", 4.0, ratio=0.5), model_row("pivoted", 3.0, ratio=0.5), *MODELS["rows"]]
    elsewhere = {**MODELS, "environment": ENVIRONMENT | {"device": "NVIDIA H200"}}
    summary = summarised({"m": {**MODELS, "rows": rows}, "q": quality, "n": elsewhere})
    dense, blast, low_rank = summary.table.rows
    # the most accurate first; what was not both scored and timed is left out
    assert [row["form"] for row in summary.table.rows] == ["dense", "blast 4x4", "low_rank"]
    prefill, decode = "prefill, Llama-7B, 1 x 1024", "decode, Llama-7B, 1 text"
    assert (dense[prefill], blast[prefill], blast[decode]) == ("1.00x", "1.50x", "2.00x")
    assert (low_rank[prefill], low_rank[decode]) == ("2.25x", "")
    score = "perplexity, 50 % kept"
    assert (dense[score], blast[score], low_rank[score]) == (17.6, 29.0, 31.0)
    assert "small on d" in summary.table.note and 'method "ours"' in summary.table.note
    assert summary.table.card == "NVIDIA H100 80GB HBM3" and "NVIDIA H200" in summary.skipped
    facts = {fact.what: (fact.number, fact.of) for fact in summary.facts}
    assert facts["as fast as dense, prefill"] == ("2.25x", "low_rank, Llama-7B, 1 x 1024")
    assert facts["perplexity, 50 % kept"] == ("29.0", "blast 4x4, small on d; dense 17.6")


@pytest.mark.parametrize("given", [{"m": MODELS}, {"q": QUALITY}, {}, {"d": {"rows": [{"a": 1}]}}])
def test_the_summary_of_what_is_there(given):
    summary = summarised(given)
    if not {"m", "q"} & set(given):
        assert summary == Summary()
        return
    columns = " ".join(summary.table.columns)
    assert ("prefill, Llama-7B" in columns) == ("m" in given) and ("perplexity" in columns) == ("q" in given)


def test_the_page_stands_alone_and_shows_text_as_text(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", *files, "--out", str(out), "--no-plots"]) == 0
    text = (out / "report.html").read_text()
    assert "<b>diffusers" not in text and "&lt;b&gt;diffusers" in text
    assert not re.findall(r'(?:src|href)="(?!#)|url\(|@import', text)
    assert 'name="viewport"' in text and "commit 0123456" in text and "tables and 0 plots" in capsys.readouterr().out
    lines = (out / "report.md").read_text().splitlines()
    assert "## Prefill of whole models" in lines and any(line.startswith("| Llama-7B | blast:4x4 ") for line in lines)


def test_the_page_goes_from_the_summary_to_questions_with_folded_tables(files, tmp_path):
    out = tmp_path / "out"
    assert main(["report", *files, str(RESULTS / "models_h200.json"), "--out", str(out), "--no-plots"]) == 0
    text = (out / "report.html").read_text()
    places = [text.index(part) for part in ("<h1>", 'class="facts"', 'class="summary"', "<nav", "<section", "<footer")]
    assert places == sorted(places)
    # the contents lead to every section, in its order
    links, found = re.findall(r'<a href="#(\w+)">', text), re.findall(r'<section id="(\w+)">', text)
    assert links == found == [key for key in QUESTIONS if key in found] and len(found) >= 5
    for key in found:
        title, help = QUESTIONS[key]
        section = text[text.index(f'<section id="{key}">') :].partition("</section>")[0]
        assert f"<h2>{title}</h2>" in section and len(re.findall(r"\.(?: |$)", help)) == 2
        # every table is folded
        before = [part for part in section.split("<table>")[:-1]]
        assert all(part.rindex("<details") > part.rfind("</details>") for part in before) and before
        # those of one card are together
        cards = re.findall(r"<h3>(.*)</h3>", section)
        assert len(cards) == len(set(cards))
    assert "<details open" not in text


def test_plots_are_asked_for_by_name(files, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", *files, "--out", str(tmp_path / "out")]) == 2
    assert "--no-plots" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_plots_of_every_kind(files, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["report", *files, "--out", str(out)]) == 0
    names = {"speed-up", "roofline", "prefill-Llama-7B", "decode-Llama-7B", "quality"}
    assert {path.name for path in out.glob("*.svg")} == {f"{name}.svg" for name in names}
    assert {path.name for path in out.glob("*.png")} == {f"{name}.png" for name in names}
    text = (out / "report.html").read_text()
    assert text.count("<svg") == 5 and "blast 4x16" in text
    # the same numbers give the same page
    assert main(["report", *files, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").read_text() == text


def test_a_page_of_all_that_was_measured(tmp_path):
    """The command that README gives."""
    files = sorted(map(str, RESULTS.glob("*.json")))
    assert main(["report", *files, "--out", str(tmp_path), "--no-plots"]) == 0
    text = (tmp_path / "report.md").read_text()
    for title in (
        "Prefill of whole models",
        "Layers of Llama-7B",
        "Projections with one input",
        "Perplexity",
        "one_token_h100",
        "In short",
    ):
        assert f"## {title}" in text


def test_plots_of_what_was_measured(tmp_path, recwarn):
    pytest.importorskip("matplotlib")
    from hf_blr.bench.report.figures import figures
    from hf_blr.bench.report.plots import as_svg

    kept = {name: read_result(RESULTS / f"{name}.json") for name in ("models_h100", "models_h200", "quality")}
    found = figures(kept)
    # two files of one kind do not take each other's names
    assert {"decode-Llama-7B-models_h100", "decode-Llama-7B-models_h200", "quality", "methods"} <= set(found)
    plot = found["quality-time-models_h100"]
    assert "NVIDIA H100" in plot.caption and plot.question == "trade" and plot.card == "NVIDIA H100 80GB HBM3"
    forward, step = plot.figure.axes
    scores = {row["structure"]: row["ppl"] for row in kept["quality"]["rows"] if half_of_wikitext(row)}
    drawn = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in step.lines}
    assert drawn["low_rank"] == (pytest.approx(3.32, abs=0.01), scores["low_rank"])
    assert "Llama-7B" in step.get_xlabel() and "SmolLM2" in step.get_ylabel() and "prefill" in forward.get_xlabel()
    # every point has its label, and no label covers another
    for axes in (forward, step):
        labels = [text for text in axes.texts if text.get_text()]
        assert sorted(text.get_text() for text in labels) == sorted(line.get_label() for line in axes.lines)
        boxes = [text.get_window_extent() for text in labels]
        assert not any(box.count_overlaps(boxes[i + 1 :]) for i, box in enumerate(boxes))
    # every bar says its milliseconds, and none is left out
    (axes,) = found["prefill-Llama-7B-models_h100"].figure.axes
    shown = {
        (row["batch"], row["tokens"], row["variant"].removesuffix("+fused"))
        for row in kept["models_h100"]["rows"]
        if (row["model"], row["measurement"]) == ("Llama-7B", "prefill")
    }
    assert len(axes.patches) == len(shown) == sum(" ms" in text.get_text() for text in axes.texts)
    for name in ("quality", "methods", "prefill-Llama-7B-models_h100"):
        assert as_svg(found[name].figure).startswith("<svg")
    # the time of a profiled step is the sum of its parts
    axes, *_ = found["parts-Llama-7B-models_h100"].figure.axes
    dense = next(row for row in kept["models_h100"]["rows"] if row["model"] == "Llama-7B" and "profile" in row)
    total = sum(dense["profile"]["parts"].values())
    assert dense["variant"] == "dense" and f"{total:.3g} ms" in [text.get_text() for text in axes.texts]
    # one model's plots are shown, the others are folded
    shown = {name for name, plot in found.items() if plot.lead and plot.question == "models"}
    assert {f"{of}-Llama-7B-models_h100" for of in ("prefill", "decode", "training")} <= shown
    assert not found["prefill-GPT2-S-models_h100"].lead
    # a figure whose panels collapse warns
    assert not [str(w.message) for w in recwarn if "layout" in str(w.message)]


def half_of_wikitext(row: dict) -> bool:
    return (row["ratio"], row["method"], row["dataset"]) == (0.5, "ours", "wikitext2")


def test_rows_that_differ_in_something_else_are_not_compared():
    twice = {"varied": ["launches"], "rows": [model_row("dense", 2.0, launches=n) for n in (0, 1)]}
    assert kind_of(twice) is None
    assert [table.title for table in tables("launches", twice)] == ["launches"]
    # rows that failed, or were measured again, are compared
    failed = {"model": "DiT-XL/2", "variant": "dense", "measurement": "build", "error": "no diffusers"}
    again = {"rows": [*MODELS["rows"], failed, failed, model_row("dense", 9.5)]}
    assert kind_of(again) == "models" and tables("x", again)[-1].title == "What failed"


def test_plots_of_several_files_and_of_rows_that_say_little():
    pytest.importorskip("matplotlib")
    from hf_blr.bench.report.figures import figures

    half = [("low_rank", None, 31.0), ("monarch", [4, 4], 35.0), ("blast", [4, 4], 29.0)]
    scored = [
        {"model": "small", "dataset": "d", "structure": s, "blocks": b, "ratio": 0.5, "ppl": p, "bytes": 1e8}
        | {"dense_ppl": 17.6, "method": "ours"}
        for s, b, p in half
    ]
    timed = [
        model_row(v, ms) for v, ms in (("dense", 8.0), ("low_rank", 4.0), ("monarch:4x4", 5.0), ("blast:4x4", 6.0))
    ]
    # another ratio is another layer
    other = [model_row("blast:4x4", 1.0, ratio=0.2)]
    files = {"m": {"rows": timed + other}, "q": {"rows": scored}}
    (axes,) = figures(files)["quality-time"].figure.axes
    drawn = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines}
    assert drawn == {"low_rank": (4, 31), "monarch 4x4": (5, 35), "blast 4x4": (6, 29), "dense": (8, 17.6)}
    # a second model's perplexities are not put beside the first's
    files["q"]["rows"] = scored + [row | {"model": "large", "ppl": 9.0} for row in scored]
    (axes,) = figures(files)["quality-time"].figure.axes
    assert len(axes.lines) == 4 and "small" in axes.get_ylabel()
    names = set(figures({**files, "q2": files["q"]}))
    assert {"quality-time-q", "quality-time-q2", "quality-q", "quality-q2"} <= names
    # no method, and no perplexity that is worth a look
    figures({"q": {"rows": [{k: v for k, v in row.items() if k != "method"} for row in scored]}})
    assert figures({"q": {"rows": [row | {"ppl": 1e9} for row in scored]}}) == {}


def test_rows_in_bits_have_a_plot_and_lines_of_their_own():
    pytest.importorskip("matplotlib")
    from hf_blr.bench.report.figures import figures

    shared = {"model": "small", "dataset": "d", "ratio": 1.0, "dense_ppl": 17.6, "bytes": 1e8, "blocks": None}
    plain = shared | {"structure": "low_rank", "ratio": 0.8, "method": "ours", "ppl": 20.0, "bits": 12.8}
    whole = [
        shared | {"structure": "dense", "method": "GPTQ", "format": form, "group_size": size, "bits": bits, "ppl": ppl}
        for form, size, bits, ppl in (("int3", 64, 3.25, 27.2), ("int4", 64, 4.25, 19.0), ("fp8", None, 8.0, 17.8))
    ]
    auto = shared | {"structure": "auto", "method": "ours", "format": "chosen", "bits": 3.5, "ppl": 21.0}
    auto |= {"kept": 0.9, "bits_per_weight": 3.5}
    auto["taken"] = {"dense int4": 20, "low_rank int4": 10, "dense fp8": 4, "dense int3": 2, "blast 4x4 fp8": 1}
    result = {"environment": ENVIRONMENT, "rows": [plain, *whole, auto]}
    (table,) = tables("q", result)
    assert [(row["stored in"], row["d ppl"]) for row in table.rows] == [
        ("fp8", 17.8),
        ("int3, groups of 64", 27.2),
        ("int4, groups of 64", 19.0),
        ("20 dense int4, 10 low_rank int4, 4 dense fp8, 3 others", 21.0),
        ("", 20.0),
    ]
    drawn = figures({"q": result})
    (axes, *_) = drawn["bits"].figure.axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["dense, GPTQ"] == ([3.25, 4.25, 8.0], [27.2, 19.0, 17.8]) and lines["auto, ours"] == ([3.5], [21.0])
    # formats are no sizes of one structure
    (axes, *_) = drawn["quality"].figure.axes
    assert [line.get_label() for line in axes.lines if not line.get_label().startswith("_")] == ["low_rank"]
    assert "bits" not in figures({"q": {"rows": [plain]}})


def test_calibration_sets_and_seeds_are_told_apart_in_tables_and_not_mixed_in_plots():
    shared = {"model": "small", "dataset": "d", "structure": "blast", "blocks": [4, 4], "ratio": 0.5, "bytes": 1e8}
    shared |= {"dense_ppl": 17.6, "method": "ours", "calibration": "web", "seed": 0}
    weights = shared | {"method": "weights", "calibration": None}
    rows = [shared | {"ppl": 30.0, "calibration": "own", "seed": 1}, shared | {"ppl": 29.0}, weights | {"ppl": 99.0}]
    (table,) = tables("q", {"environment": ENVIRONMENT, "rows": rows})
    assert {(row["calibration"], row["seed"]) for row in table.rows} == {("own", 1), ("web", 0), (None, 0)}
    assert [row["ppl"] for row in usable(rows[1:])] == [29.0, 99.0]
    assert [row["ppl"] for row in usable(rows)] == [30.0]
    assert len(usable(rows[2:])) == 1 and usable([]) == []


def test_what_is_no_result_file_is_said(tmp_path, capsys):
    for content, message in (("{", "no JSON"), ('{"a": 1}', '"rows"')):
        (tmp_path / "x.json").write_text(content)
        assert main(["report", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def browse(path, tmp_path, *more):
    """(document after its scripts ran, messages on the console)."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [BROWSER, *options, *more, profile, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
class TestInABrowser:
    def test_it_opens_without_a_word_on_the_console(self, files, tmp_path):
        assert main(["report", *files, "--out", str(tmp_path), "--no-plots"]) == 0
        document, console = browse(tmp_path / "report.html", tmp_path)
        assert "Prefill of whole models" in document and console == []

    @pytest.mark.slow
    def test_so_does_the_page_of_what_was_measured(self, tmp_path):
        pytest.importorskip("matplotlib")
        files = [str(RESULTS / f"{name}.json") for name in ("models_h100", "quality", "groups_h100")]
        assert main(["report", *files, "--out", str(tmp_path)]) == 0
        document, console = browse(tmp_path / "report.html", tmp_path)
        assert document.count("<svg") > 10 and console == []

    def test_a_phone_scrolls_tables_and_not_the_page(self, files, tmp_path):
        pytest.importorskip("matplotlib")
        assert main(["report", *files, "--out", str(tmp_path)]) == 0
        text = (tmp_path / "report.html").read_text().replace("<details", "<details open")
        inner = json.dumps(text).replace("</", "<\\/")
        frame = f"""<iframe style="width: 390px; height: 800px; border: 0"></iframe><script>
            const frame = document.querySelector("iframe");
            frame.onload = () => {{
              const root = frame.contentDocument.documentElement, tables = root.querySelectorAll(".wide");
              const wide = [...tables].filter(table => table.scrollWidth > table.clientWidth).length;
              document.title = `${{root.clientWidth}} ${{root.scrollWidth}} ${{tables.length}} ${{wide > 0}}`;
            }};
            frame.srcdoc = {inner};
        </script>"""
        (tmp_path / "frame.html").write_text(f"<!doctype html><title>none</title>{frame}")
        document, console = browse(tmp_path / "frame.html", tmp_path)
        width, needed, tables, wide = re.search("<title>(.*?)</title>", document)[1].split()
        # some table is wider than the phone, or this would test nothing
        assert int(needed) <= int(width) <= 390 and int(tables) > 5 and wide == "true" and console == []

    def test_the_dark_page_is_dark_and_its_plots_are_light_on_it(self, files, tmp_path):
        pytest.importorskip("matplotlib")
        assert main(["report", *files, "--out", str(tmp_path)]) == 0
        asks = """<script>
            const light = colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 3;
            const texts = [...document.querySelectorAll("figure svg text")];
            const letters = texts.map(text => light(getComputedStyle(text).fill));
            document.title = [light(getComputedStyle(document.body).backgroundColor), Math.min(...letters),
                Math.max(...letters)].map(Math.round).join(" ");
        </script></body>"""
        text = (tmp_path / "report.html").read_text().replace("</body>", asks)
        (tmp_path / "page.html").write_text(text)
        for scheme, dark in (("0", True), ("1", False)):
            document, _ = browse(tmp_path / "page.html", tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
            ground, darkest, lightest = map(int, re.findall("<title>([^<]*)</title>", document)[0].split())
            assert (ground < 40 and darkest > 150) if dark else (ground > 220 and lightest < 100)

    def test_a_mistake_would_show(self, tmp_path):
        (tmp_path / "x.html").write_text("<p>shown</p><script>nonsense()</script>")
        document, console = browse(tmp_path / "x.html", tmp_path)
        assert "shown" in document and len(console) == 1

    @pytest.mark.parametrize(
        "column, clicks, order",
        [("ms", 1, "bcad"), ("ms", 2, "acbd"), ("name", 2, "dcba"), ("speed", 1, "cbda")],
    )
    def test_a_table_sorts(self, tmp_path, column, clicks, order):
        # as words 10 would come before 9, and 1e-05 after both; an empty cell is last either way
        cells = {"a": (10.0, None), "b": (1e-05, "2.00x"), "c": (9, "1.90x"), "d": (None, "10.00x")}
        rows = [{"name": name, "ms": ms, "speed": speed} for name, (ms, speed) in cells.items()]
        text = page("Sorting", [Table("t", rows)], [], [], Summary())
        click = f"""<script>
            const header = [...document.querySelectorAll("th")].find(h => h.textContent === "{column}");
            for (let i = 0; i < {clicks}; i++) header.click();
            document.title = [...document.querySelectorAll("tbody tr")].map(r => r.cells[0].textContent).join("");
        </script>"""
        (tmp_path / "page.html").write_text(text.replace("</body>", click + "</body>"))
        document, console = browse(tmp_path / "page.html", tmp_path)
        assert f"<title>{order}</title>" in document and console == []
        direction = "ascending" if clicks == 1 else "descending"
        assert len(re.findall(f'<th[^>]*aria-sort="{direction}"', document)) == 1
        # and from the keyboard
        press = 'header.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}))'
        (tmp_path / "page.html").write_text(text.replace("</body>", click.replace("header.click()", press) + "</body>"))
        assert f"<title>{order}</title>" in browse(tmp_path / "page.html", tmp_path)[0]


def test_readme_script_reads_the_files_that_the_benchmark_writes(tmp_path, monkeypatch):
    import runpy

    module = runpy.run_path(str(RESULTS.parent / "readme.py"))
    section = module["model_sections"].models_section
    monkeypatch.setitem(section.__globals__, "RESULTS", tmp_path)
    environment = {**ENVIRONMENT, "transformers": "5.17.0"}
    rows = [row | {"commit": ENVIRONMENT["commit"]} for row in MODELS["rows"]]
    write_result(tmp_path / "models_h100.json", {**MODELS, "environment": environment, "rows": rows})
    text = section()
    lines = [line for line in text.splitlines() if line.startswith("| Llama-7B")]
    prefill, decode = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert prefill[:3] == ["Llama-7B", "1 x 1024", "9.00"] and "1.50x" in prefill
    assert decode[:3] == ["Llama-7B", "1 x 1", "8.00"] and "2.00x" in decode
    # a table only of what was measured
    assert "A training step" not in text
    assert "mode default" in text and "commit 0123456" in text and json.dumps("<b>") not in text
