"""Refinement with many tokens a step, on matrices that are made once a forward."""

import copy
import functools
import sys

import pytest
import torch
from tiny import tiny_llama

from hf_blr import BLRConfig, compress
from hf_blr.finetune import matrices, refine
from hf_blr.finetune.matrices import on_matrices
from hf_blr.finetune.products import products
from hf_blr.linear import BLRLinear, blr_modules

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
LEFT = "model.layers.1.mlp.down_proj"
#: outputs, rank and inputs of pairs
SHAPES = [(6, 2, 5), (3, 3, 4), (7, 1, 5)]


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


def test_products_and_their_gradients_are_those_of_each_pair():
    torch.manual_seed(0)
    pairs = [(torch.randn(n, r).requires_grad_(), torch.randn(r, k).requires_grad_()) for n, r, k in SHAPES]
    weights = [torch.randn(n, k) for n, _, k in SHAPES]
    factors = [factor for pair in pairs for factor in pair]
    for dtype in (torch.float32, torch.bfloat16):
        wanted = [u.to(dtype) @ v.to(dtype) for u, v in pairs]
        found = products(pairs, dtype)
        # the last matrix is not used
        by = [
            torch.autograd.grad(
                [(w * m.float()).sum() for w, m in zip(weights[:-1], each[:-1], strict=True)], factors[:-2]
            )
            for each in (wanted, found)
        ]
        torch.testing.assert_close(found, tuple(wanted), rtol=0, atol=0)
        torch.testing.assert_close(by[1], by[0], rtol=0, atol=0)


def test_layers_that_are_made_together_are_neighbours(monkeypatch):
    model, made = compressed("low_rank").train(), []
    monkeypatch.setattr("hf_blr.finetune.matrices.TOGETHER", 4)
    own = matrices.products
    monkeypatch.setattr(matrices, "products", lambda pairs, dtype: made.append(list(pairs)) or own(pairs, dtype))
    with on_matrices(model, tiny_llama(), torch.float32, compiled=False):
        model(input_ids=WINDOWS)
    layers = [(module.u, module.v) for module in blr_modules(model).values()]
    assert [len(pairs) for pairs in made] == [4] * (len(layers) // 4) + [len(layers) % 4] * (len(layers) % 4 > 0)
    for (u, v), (wanted_u, wanted_v) in zip([pair for pairs in made for pair in pairs], layers, strict=True):
        assert u is wanted_u and v is wanted_v


def test_a_forward_that_raises_leaves_the_layers_in_their_places():
    model = compressed("low_rank").train()
    modules = dict(model.named_modules())
    with on_matrices(model, tiny_llama(), torch.float32, compiled=False):
        # words that the model does not know
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1000]]))
        assert dict(model.named_modules()) == modules
