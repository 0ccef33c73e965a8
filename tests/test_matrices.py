"""Refinement with many tokens a step, on matrices that are made once a forward."""

import copy
import functools
import sys

import pytest
import torch
from tiny import tiny_llama

from hf_blr import BLRConfig, compress
from hf_blr.finetune import refine
from hf_blr.finetune.matrices import on_matrices
from hf_blr.linear import BLRLinear

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
LEFT = "model.layers.1.mlp.down_proj"


def compressed(structure):
    """A model of three blocks of different ranks, with one projection left dense in the second."""
    model = tiny_llama(num_hidden_layers=3)
    blocks = 2 if structure == "blast" else None
    compress(
        model, BLRConfig(structure, ratio=0.6, num_blocks=blocks), calibration=list(WINDOWS.split(4)), progress=False
    )
    if isinstance(model.get_submodule(LEFT), BLRLinear):
        model.set_submodule(LEFT, model.get_submodule(LEFT).to_dense())
    return model


def refined(model, **kwargs):
    found = copy.deepcopy(model)
    modules = dict(found.named_modules())
    how = {"epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "dense_rate": 0.5, **kwargs}
    history = refine(found, tiny_llama(num_hidden_layers=3), WINDOWS, **how)
    # the projections are what they were
    assert dict(found.named_modules()) == modules
    return found, [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("structure", ["low_rank", "blast"])
def test_long_steps_train_as_short_ones_do_and_run_no_layer(monkeypatch, structure):
    model, calls = compressed(structure), []
    monkeypatch.setattr(BLRLinear, "forward", counted(BLRLinear.forward, calls))
    wanted, losses = refined(model)
    assert calls
    calls.clear()
    monkeypatch.setattr(sys.modules["hf_blr.finetune.refine"], "DENSE_STEP_TOKENS", 128)
    found, found_losses = refined(model)
    assert not calls
    assert found_losses == pytest.approx(losses, rel=1e-4) and losses[-1] < losses[0]
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)


def counted(forward, calls):
    @functools.wraps(forward)
    def counting(self, x):
        calls.append(self)
        return forward(self, x)

    return counting


@pytest.mark.parametrize("dense_rate", [0.0, 0.5])
def test_compiled_blocks_share_their_code_and_train_the_same(monkeypatch, dense_rate):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("hf_blr.finetune.matrices.torch.compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model = compressed("low_rank")
    wanted, losses = refined(model, dense_rate=dense_rate)
    monkeypatch.setattr(sys.modules["hf_blr.finetune.refine"], "DENSE_STEP_TOKENS", 128)
    found, found_losses = refined(model, dense_rate=dense_rate, compiled=True)
    assert found_losses == pytest.approx(losses, rel=1e-4)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)
    # the teacher's blocks, the first one of the model, whose input needs no gradient, and all others
    assert len(graphs) == 3


def test_a_forward_that_raises_leaves_the_layers_in_their_places():
    model = compressed("low_rank").train()
    modules = dict(model.named_modules())
    with on_matrices(model, tiny_llama(), torch.float32, compiled=False):
        # words that the model does not know
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1000]]))
        assert dict(model.named_modules()) == modules
