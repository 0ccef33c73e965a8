"""The benchmark of training steps in float8: rows in rounds, on file as soon as there is one."""

from contextlib import contextmanager, nullcontext
from threading import Barrier, BoundedSemaphore, Lock, Thread, get_ident

import float8_training
import pytest
from decode_in_bits import ROUNDS

from hf_blr.bench.measure import training
from hf_blr.bench.report.files import read_result

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def job(index, path=""):
    return float8_training.Job(index, 1, 16, "cpu", "abc", str(path))


@pytest.mark.parametrize("index", [0, 2])
def test_a_row_has_a_turn_for_each_round(monkeypatch, index):
    turns, kept = [], []

    @contextmanager
    def turn():
        turns.append(len(kept))
        yield

    def uncompiled(*args, **kw):
        return training(*args[:5], "graph", *args[6:], **kw)

    monkeypatch.setattr(float8_training, "training", uncompiled)
    row = float8_training.row_of(job(index), nullcontext(), turn, kept.append, **TINY)
    assert turns == list(range(ROUNDS)) and [len(found["ms_of_rounds"]) for found in kept] == [1, 2, 3, 4, 5]
    assert row == kept[-1] and row["ms"] == sorted(row["ms_of_rounds"])[ROUNDS // 2]
    variant, impl = float8_training.STEPS[index]
    assert (row["variant"], row["impl"], row["float8"]) == (variant, impl, index == 2) and row["tokens"] == 16


def test_steps_take_turns_and_one_that_fails_lets_the_others_go_on(monkeypatch, tmp_path):
    """In threads in place of processes, so without models."""
    together, alone, order, kept, path = Barrier(3, timeout=60), Lock(), [], [], tmp_path / "rows.json"

    def row_of(job, building, turn, so_far):
        for _ in range(ROUNDS):
            with turn():
                assert not alone.acquire(blocking=False)
                order.append(get_ident())
                if job.index == 0:
                    raise ValueError("no room")
                so_far(float8_training.named(job) | {"ms": 1.0})
                kept.append(len(read_result(path)["rows"]))
        return float8_training.named(job) | {"ms": 1.0}

    monkeypatch.setattr(float8_training, "row_of", row_of)
    arguments = BoundedSemaphore(1), together, alone
    threads = [Thread(target=float8_training.work, args=(job(index, path), *arguments)) for index in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # the one that failed had a part of the first round
    assert len(order) == 2 * ROUNDS + 1 and len(set(order[:3])) == 3
    # on file from the first round on
    assert kept[0] in (1, 2) and kept[-1] == 3
    rows = read_result(path)["rows"]
    assert sorted((row["variant"], row["impl"], "error" in row) for row in rows) == [
        ("dense", "plain", True),
        ("low_rank", "float8", False),
        ("low_rank", "plain", False),
    ]
