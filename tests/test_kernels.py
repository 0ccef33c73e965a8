"""The kernels against float64, at small odd sizes, under Triton's interpreter on the CPU."""

import pytest
import torch
from kernel_cases import FUNCTIONS, NAMES, assert_within_budget, leaves, make_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]
triton = pytest.importorskip("triton")

# B1, B2, P, Q, R: odd, rectangular, rank one, many blocks
SIZES = [(3, 2, 20, 18, 7), (2, 4, 16, 24, 16), (1, 1, 9, 5, 1), (5, 3, 6, 7, 2)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 37])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_outputs_and_gradients_keep_the_error_budget(structure, tokens, size):
    assert_within_budget(structure, make_inputs(structure, tokens, *size, torch.float32))


@pytest.mark.parametrize("tokens", [1, 4, 35])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_float16_keeps_the_error_budget(structure, tokens):
    assert_within_budget(structure, make_inputs(structure, tokens, 4, 3, 8, 10, 6, torch.float16, bias=False))


@pytest.mark.parametrize("blocks", [(16, 16), (4, 16), (16, 4)], ids=str)
@pytest.mark.parametrize("tokens", [2, 34])
def test_blast_with_many_blocks(tokens, blocks):
    # without a bias, and with ranks that do and do not fit the vectors
    for rank, bias in ((5, True), (16, False)):
        tensors = make_inputs("blast", tokens, *blocks, 4, 3, rank, torch.float32, bias=bias)
        assert_within_budget("blast", tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mix_inside_the_last_stage(dtype):
    from hf_blr.ops.triton.blast import blast_expand

    x, u, s, v, bias = (t.detach() for t in make_inputs("blast", 19, 3, 2, 8, 20, 9, dtype))
    y = torch.bmm(x.view(19, 3, 8).transpose(0, 1), v.transpose(1, 2))
    out = x.new_empty(19, 40)
    blast_expand(y, u, s, bias, out)
    exact = FUNCTIONS["blast"][1](*(t.double() for t in (x, u, s, v, bias)))
    eager = FUNCTIONS["blast"][1](x, u, s, v, bias)
    allowed = 2 * (eager - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (out - exact).norm() <= allowed


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_no_tokens(structure):
    tensors = make_inputs(structure, 0, 3, 2, 20, 18, 7, torch.float32)
    out = FUNCTIONS[structure][0](*tensors, impl="triton")
    assert out.shape == (0, 36)
    grads = torch.autograd.grad(out.sum(), leaves(tensors))
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves(tensors), strict=True))


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_any_leading_shape_and_stride(structure):
    tensors = [t.detach() for t in make_inputs(structure, 12, 3, 2, 4, 5, 3, torch.float32)]
    expected = FUNCTIONS[structure][1](*tensors)
    x = tensors[0].view(3, 4, 12).transpose(0, 1)
    strided = [t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors[1:]]
    out = FUNCTIONS[structure][0](x, *strided, impl="triton")
    torch.testing.assert_close(out, expected.view(3, 4, 10).transpose(0, 1))


@pytest.mark.parametrize("tokens", [3, 33])
@pytest.mark.parametrize(
    "structure, wanted",
    [(s, name) for s in ("pivoted", "blast") for name in NAMES[s] if name != "order"],
)
def test_one_gradient_alone(structure, wanted, tokens):
    inputs = make_inputs(structure, tokens, 2, 3, 4, 5, 6, torch.float32)
    tensors = dict(zip(NAMES[structure], inputs, strict=True))
    for name, t in tensors.items():
        t.requires_grad_(name == wanted)
    t = tensors[wanted]
    got, expected = (
        torch.autograd.grad(f(*tensors.values()).square().sum(), t)[0]
        for f in (lambda *a: FUNCTIONS[structure][0](*a, impl="triton"), FUNCTIONS[structure][1])
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
