"""The benchmark of whole models' forwards in bits: rounds, and rows that are in the file from the first one on."""

from contextlib import contextmanager, nullcontext
from threading import Barrier, BoundedSemaphore, Lock

import prefill_in_bits
import pytest
from tiny import tiny_llama

from hf_blr.bench import measure
from hf_blr.bench.models import Shape
from hf_blr.bench.report.files import read_result


@pytest.fixture(autouse=True)
def tiny_benchmark(monkeypatch):
    monkeypatch.setattr(measure, "with_compiled_pieces", lambda call, modules, mode: call)
    monkeypatch.setattr(prefill_in_bits, "SECONDS", 0.01)
    monkeypatch.setitem(prefill_in_bits.SHAPES, "tiny", Shape("text", tiny_llama))


def test_both_forwards_are_timed_in_each_round():
    kept = []

    @contextmanager
    def turn():
        before = len(kept)
        yield
        # at the end of each round there are rows
        assert len(kept) == before + 1

    def so_far(rows):
        kept.append([(row["tokens"], len(row["ms_of_rounds"]), row["ms"]) for row in rows])

    rows = prefill_in_bits.rows_of("tiny", "low_rank/fp8+fused", (16, 8), "cpu", nullcontext(), turn, so_far)
    assert [[found[:2] for found in of] for of in kept] == [[(16, n), (8, n)] for n in (1, 2, 3)]
    for row in rows:
        assert row["ms"] == sorted(row["ms_of_rounds"])[1] > 0
        assert row["ratio"] == 0.5 and row["form"] == "compiled" and "rival" not in row
    # that of the second would have the first's graph in it
    assert ["peak_bytes" in row for row in rows] == [True, False]


def test_what_stops_a_run_takes_one_round(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    job, shared = ("tiny", "dense", (8,), "cpu", "abc"), (BoundedSemaphore(1), Barrier(1), Lock(), str(path))
    prefill_in_bits.work(job, *shared)
    (before,) = read_result(path)["rows"]
    assert before["commit"] == "abc" and len(before["ms_of_rounds"]) == prefill_in_bits.ROUNDS
    prefill_in_bits.work(("tiny", "low_rank/int4", (8,), "cpu", "abc"), *shared)
    median, calls = prefill_in_bits.Timer.median, []

    def stops(timer, run):
        calls.append(run)
        if len(calls) == 2:
            raise ValueError("no room")
        return median(timer, run)

    monkeypatch.setattr(prefill_in_bits.Timer, "median", stops)
    prefill_in_bits.work(("tiny", "dense", (8,), "cpu", "def"), *shared)
    # the row of the first round in the place of the one before, and that of the other variant
    other, row = read_result(path)["rows"]
    assert other["variant"] == "low_rank/int4"
    assert row["variant"] == "dense" and row["commit"] == "def" and len(row["ms_of_rounds"]) == 1
