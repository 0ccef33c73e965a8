"""The benchmark of layers in bits at few tokens, at small sizes: which rows it writes, and which it leaves."""

import json

import packed_decode
import pytest

from hf_blr.bench.report.files import read_result

LAYER = (128, 128, 64, 128)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    monkeypatch.setattr(packed_decode, "LAYERS", (LAYER,))
    monkeypatch.setattr(packed_decode, "BYTES", 1)
    monkeypatch.setattr(packed_decode, "COPIES", 1)
    monkeypatch.setattr(packed_decode.Timer, "median", lambda timer, run, flush: timer.once(run, flush))
    path = tmp_path / "rows.json"

    def measured(*kinds):
        monkeypatch.setattr(packed_decode, "KINDS", kinds)
        arguments = ["packed_decode.py", "--tokens", "2", "--device", "cpu", "--commit", "abc", "--json", str(path)]
        monkeypatch.setattr("sys.argv", arguments)
        packed_decode.main()
        return read_result(path)

    measured.path = path
    return measured


def test_rows_and_those_that_fail(measured, capsys):
    """PyTorch's int4 runs on GPUs alone."""
    rows = measured(("plain", None, False), ("int4", 128, False), ("int4", 128, True), ("int4", None, True))["rows"]
    sizes = [(row["format"], row["group"], row["rank"]) for row in rows]
    # in groups the rank is a multiple of them
    assert sizes == [("plain", None, None), ("int4", 128, 128), ("int4", None, 64)]
    assert all(len(row["us"]) == packed_decode.GRAPHS and row["commit"] == "abc" for row in rows)
    assert "('int4', 128, False), 2) is left out: " in capsys.readouterr().out


def test_what_is_measured_again_takes_the_place_of_what_was_and_the_rest_stays(measured):
    row = {
        "in_features": 128,
        "out_features": 128,
        "rank": 64,
        "tokens": 2,
        "format": "fp8",
        "group": None,
        "us": [9.0],
    }
    before = measured(("int8", None, True))
    of_others = {
        "checks": "18 tests",
        "protocol": "another",
        "environment": before["environment"] | {"commit": "older"},
    }
    measured.path.write_text(json.dumps(before | of_others | {"rows": [row, {**row, "tokens": 4}]}))
    found = measured(("fp8", None, True))
    assert found["checks"] == "18 tests" and found["protocol"] == packed_decode.PROTOCOL
    assert [row["tokens"] for row in found["rows"]] == [4, 2] and found["rows"][1]["us"] != [9.0]
    # each stays of the commit that it was measured at
    assert [row["commit"] for row in found["rows"]] == ["older", "abc"]
