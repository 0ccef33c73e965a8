"""The registered ops as PyTorch sees them, and the choice between them and plain PyTorch."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import FUNCTIONS, leaves, make_inputs

from hf_blr import ops
from hf_blr.ops import dispatch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runs kernels under the interpreter only")


@interpreted
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_opcheck(structure, keep):
    pytest.importorskip("triton")
    tensors = [t.detach() for t in make_inputs(structure, 33 if keep else 2, 2, 3, 4, 5, 6, torch.float32)]
    torch.library.opcheck(getattr(torch.ops.hf_blr, structure), (*tensors, keep, "" if keep else "gelu"))
    grad = torch.randn(tensors[0].shape[0], 15)
    y = getattr(torch.ops.hf_blr, structure)(*tensors, keep, "")[1]
    needs = [True, keep, *[True] * (len(leaves(tensors)) - 3)]
    backward = getattr(torch.ops.hf_blr, structure + "_backward")
    torch.library.opcheck(backward, (grad, *tensors[:-1], y, needs))


@interpreted
@pytest.mark.parametrize("tokens", [2, 33])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_compiles_as_one_graph_with_its_backward(structure, tokens):
    pytest.importorskip("triton")
    tensors = make_inputs(structure, tokens, 2, 3, 4, 5, 6, torch.float32)
    with ops.use_impl("triton"):
        compiled = torch.compile(FUNCTIONS[structure][0], fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*tensors).square().sum(), leaves(tensors))
    expected = torch.autograd.grad(FUNCTIONS[structure][1](*tensors).square().sum(), leaves(tensors))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_auto_is_the_reference_on_a_cpu():
    x = torch.randn(3, 12)
    assert dispatch.resolve_impl(None, x, []) == "reference"
    assert dispatch.resolve_impl("auto", x, []) == "reference"


def test_what_auto_prefers_on_a_gpu():
    def prefers(structure, tokens, dtype=torch.bfloat16):
        return dispatch.worthwhile(torch.empty(tokens, 64, dtype=dtype), ops.implementation_of(structure).pays)

    assert prefers("low_rank", 1) and prefers("low_rank", 16) and not prefers("low_rank", 17)
    # its op gathers the inputs whoever multiplies
    assert prefers("pivoted", 2) and prefers("pivoted", 4096)
    assert not any(prefers(s, 1, torch.float32) for s in FUNCTIONS)


def test_use_impl_sets_and_restores():
    with ops.use_impl("reference"):
        assert ops.current_impl() == "reference"
        with ops.use_impl("auto"):
            assert ops.current_impl() == "auto"
        assert ops.current_impl() == "reference"
    assert ops.current_impl() == "auto"


def test_unknown_impl_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'auto', 'triton', 'reference'"):
        ops.low_rank_linear(torch.randn(2, 4), torch.randn(3, 1), torch.randn(1, 4), impl="cuda")


@interpreted
def test_asked_for_triton_says_why_not():
    x, u, v = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 1).double(), torch.randn(1, 4).double()
    with pytest.raises(RuntimeError, match="dtype torch.float64"):
        ops.low_rank_linear(x, u, v, impl="triton")
    with pytest.raises(RuntimeError, match="the factors have dtype torch.float64"):
        ops.low_rank_linear(x.float(), u, v, impl="triton")


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_shapes_that_do_not_fit_are_refused(structure):
    x, *factors = make_inputs(structure, 2, 2, 3, 4, 5, 6, torch.float32, bias=False)
    with pytest.raises(ValueError, match="do not fit each other"):
        FUNCTIONS[structure][0](x[:, :-1], *factors)


def test_import_leaves_triton_alone():
    code = "import sys; import hf_blr.ops; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
