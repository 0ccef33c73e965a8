"""One graph for any number of tokens: `torch.compile(dynamic=True)` and `torch.export`, by the reference ops."""

import pytest
import torch
from kernel_cases import FUNCTIONS, leaves, make_inputs

from hf_blr.linear import BLRLinear
from hf_blr.structures import structures

#: the batch and the tokens of each call; a graph made for the first must serve the others
LEADS = [(3, 5), (2, 7), (4, 4), (5, 33)]


class Counter:
    """A backend of `torch.compile` that counts its graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What another test compiled is neither reused nor counted towards the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module_for(structure):
    """A layer 12 -> 15, of several blocks where the structure has them."""
    blocks = (1, 1) if structure in ("low_rank", "pivoted") else (2, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BLRLinear.from_spec(structures()[structure].spec(12, 15, 4, blocks), dtype=torch.float64)


def inputs_for(lead):
    return torch.randn(*lead, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(function, module, x):
    """[output, *gradients of the factors, bias and input]"""
    x = x.clone().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [*module.parameters(), x])]


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_one_compiled_module_serves_any_number_of_tokens(structure):
    module, counter = module_for(structure), Counter()
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend=counter)
    for lead in LEADS:
        x = inputs_for(lead)
        torch.testing.assert_close(gradients(compiled, module, x), gradients(module, module, x))
    assert counter.graphs == 1


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_a_compiled_op_takes_factors_of_any_size(structure):
    """Compiled as a function, the factors' sizes are symbols as well."""
    op, counter = FUNCTIONS[structure][0], Counter()
    compiled = torch.compile(op, dynamic=True, fullgraph=True, backend=counter)
    # no two of the first sizes agree: those that do are taken for one symbol
    for tokens, p in ((11, 7), (13, 6), (5, 9)):
        tensors = make_inputs(structure, tokens, 2, 3, p, 5, 4, torch.float64)
        got, expected = compiled(*tensors), op(*tensors)
        torch.testing.assert_close(got, expected)
        wanted = torch.autograd.grad(expected.square().sum(), leaves(tensors))
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), leaves(tensors)), wanted)
    assert counter.graphs == 1


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_compiled_without_tokens(structure):
    module = module_for(structure)
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    for lead in ((0,), (2, 0), ()):
        assert compiled(inputs_for(lead)).shape == (*lead, 15)


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_an_exported_module_serves_any_number_of_tokens(structure):
    module = module_for(structure)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    exported = torch.export.export(module, (inputs_for(LEADS[0]),), dynamic_shapes=({0: batch, 1: tokens},))
    for lead in LEADS:
        x = inputs_for(lead)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_an_exported_module_survives_its_file(structure, tmp_path):
    module = module_for(structure)
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(module, (inputs_for((4,)),), dynamic_shapes=({0: tokens},))
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = inputs_for((9,))
    torch.testing.assert_close(loaded(x), module(x))
