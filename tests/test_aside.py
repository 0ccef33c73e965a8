"""Kernels beside others: which wait for which, told by the calls that CUDA would get."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from float8_training_cases import layer, numbers

from hf_blr.ops import aside, float8_products
from hf_blr.ops.aside import Aside


def test_what_waits_for_what(monkeypatch):
    said = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            said.append(f"{self.name} marks")
            return "the mark"

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

    @contextmanager
    def switched(stream):
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    monkeypatch.setattr(aside, "second_stream", lambda device: Stream("second"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("first"))
    monkeypatch.setattr(torch.cuda, "stream", switched)
    beside = Aside(torch.device("cuda", 0), True)
    with beside:
        said.append("kernel")
    beside.join()
    found = ["second waits for first", "on second", "kernel", "off second", "second marks", "first waits for the mark"]
    assert said == found
    for ordinary in (Aside(torch.device("cuda", 0), False), Aside(torch.device("cpu"), True)):
        with ordinary:
            pass
        ordinary.join()
    assert said == found


def test_a_step_reads_nothing_from_aside_before_it_waited(monkeypatch):
    """Each operand that is made aside is used there, or after a join."""
    made, unread, kept = {}, set(), []
    here = SimpleNamespace(inside=None)

    class Watched(Aside):
        def __init__(self, device, on):
            super().__init__(device, False)
            unread.add(self)

        def __enter__(self):
            here.inside = self

        def __exit__(self, *raised):
            here.inside = None

        def join(self):
            unread.discard(self)

    def watching(call):
        def watched(*args, **kw):
            found = call(*args, **kw)
            # so that no other takes its place in memory
            kept.append(found)
            flat = found if isinstance(found, tuple) else (found,)
            for t in (t for part in flat for t in (part if isinstance(part, tuple) else (part,))):
                made[t.data_ptr()] = here.inside
            for t in (t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,))):
                owner = made.get(t.data_ptr()) if isinstance(t, torch.Tensor) else None
                assert owner is None or owner is here.inside or owner not in unread
            return found

        return watched

    monkeypatch.setattr(float8_products, "Aside", Watched)
    for name in ("cast", "cast_both", "cast_columns", "cast_stacked", "transposed", "product", "product_of_codes"):
        monkeypatch.setattr(float8_products, name, watching(getattr(float8_products, name)))
    module = layer()
    x, grad = numbers(32)
    torch.autograd.grad(module(x.requires_grad_()), (x, module.u, module.v), grad)
    assert not unread and any(made.values())
    monkeypatch.setattr(Watched, "join", lambda self: None)
    with pytest.raises(AssertionError):
        module(x)
