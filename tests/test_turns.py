"""Benchmarks in processes that take turns: each job has its own, and none of a missing library is begun."""

import os

import turns
from turns import Turns, in_turns, that_can_run


def said(job, building, together, alone, path):
    """Which job this process has, and when it has its turns."""
    rounds = Turns(together, alone, 2)
    with building:
        pass
    for number in range(2):
        with rounds.turn(), open(path, "a") as file:
            file.write(f"{number} {job} {os.getpid()}\n")


def test_each_job_has_a_process_and_a_turn_in_each_round(tmp_path):
    in_turns(said, ["a", "b"], str(tmp_path / "said"))
    lines = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    # a round is over before the next begins
    assert [number for number, *_ in lines] == ["0", "0", "1", "1"]
    assert sorted(job for _, job, _ in lines) == ["a", "a", "b", "b"]
    assert len({(job, process) for _, job, process in lines}) == len({process for *_, process in lines}) == 2


def test_what_no_library_runs_is_left_out_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(turns, "missing", lambda by: "not installed" if by == "gemlite" else None)
    assert that_can_run(["dense", "dense/int4, gemlite", "dense/fp8, torchao"]) == ["dense", "dense/fp8, torchao"]
    assert capsys.readouterr().out == "dense/int4, gemlite is left out: not installed\n"
