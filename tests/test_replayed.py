"""What tells whether steps on a block may be replayed as one graph."""

import pytest
import torch
from tiny import tiny_llama

from hf_blr.calibration.aim import Aim
from hf_blr.calibration.calls import Call
from hf_blr.calibration.replayed import reads_numbers

X = torch.randn(4, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda: X[X > 0],
        lambda: X.sum().item(),
        lambda: X.nonzero(),
        lambda: X.to("meta"),
        lambda: X.masked_select(X > 0),
    ],
)
def test_what_hands_numbers_to_the_host_is_noticed(function):
    assert reads_numbers(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda: X[torch.tensor([1, 0])],
        lambda: X.masked_fill(X > 0, 0).softmax(-1) @ X.mT,
        lambda: X.to(torch.float64).sum(),
        lambda: tiny_llama().model.layers[0](X.new_ones(1, 4, 64), position_embeddings=(X.new_ones(1, 4, 16),) * 2),
    ],
)
def test_what_does_not_is_not(function):
    assert not reads_numbers(function)


def aim(*calls, real=None):
    return Aim(None, None, list(calls), [real] * len(calls))


def test_runs_are_alike_that_differ_in_hidden_states_alone():
    call, copied = (Call((X.clone(), None), {"position_embeddings": (X + 1, X + 2), "flag": True}) for _ in range(2))
    assert aim(call).alike and aim(call, copied).alike
    assert not aim(call, copied, real=torch.ones(4, dtype=torch.bool)).alike
    for args, kwargs in (
        ((X, None), {"position_embeddings": (X + 1, X + 3), "flag": True}),
        ((X, None), {"position_embeddings": (X + 1, X + 2), "flag": False}),
        ((X, X), {"position_embeddings": (X + 1, X + 2), "flag": True}),
        ((X[:2], None), {"position_embeddings": (X + 1, X + 2), "flag": True}),
        ((X, None), {"flag": True}),
    ):
        assert not aim(call, Call(args, kwargs)).alike
    assert not aim(call, Call(call.args, call.kwargs, "hidden_states")).alike
