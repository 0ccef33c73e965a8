"""Benchmarks whose rows have a process each: all compile at once, and each is timed alone, once in each round."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.synchronize import Barrier, Lock
from typing import Any

from hf_blr.bench.rivals import missing
from hf_blr.bench.variants import Variant


class Turns:
    """The rounds of several processes, in each of which every one has the device to itself once."""

    def __init__(self, together: Barrier, alone: Lock, count: int):
        self.together, self.alone, self.left = together, alone, count

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until all others are in the same round, and none has its turn."""
        self.together.wait()
        self.left -= 1
        with self.alone:
            yield

    def pass_on(self) -> None:
        """Let the others have the rounds that are left."""
        while self.left:
            with self.turn():
                pass


def in_turns(work: Callable, jobs: Sequence[Any], *more: Any) -> None:
    """Calls `work(job, building, together, alone, *more)` for each job, in a process of its own.

    work: builds its model within the semaphore `building`, and makes its `Turns` of `together` and `alone`.
    """
    context = multiprocessing.get_context("spawn")
    # two are built at a time: each takes the memory of a dense model
    shared = context.Semaphore(2), context.Barrier(len(jobs)), context.Lock()
    processes = [context.Process(target=work, args=(job, *shared, *more)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def that_can_run(variants: Iterable[str]) -> list[str]:
    """The variants without those of libraries that are missing here; says why."""
    found = []
    for name in variants:
        by = Variant.parse(name).by
        if reason := missing(by) if by else None:
            print(f"{name} is left out: {reason}")
        else:
            found.append(name)
    return found
