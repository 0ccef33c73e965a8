"""Activations inside the last stage, and the product of a gated MLP, under Triton's interpreter on the CPU."""

import pytest
import torch
from kernel_cases import FUNCTIONS, GROUPED, assert_gated_within_budget, make_inputs

from hf_blr import ops
from hf_blr.ops.activations import ACTIVATIONS, activated

pytestmark = pytest.mark.usefixtures("poisoned_buffers")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU")
#: (Q, R) of both layers
EQUAL, RAGGED = [(10, 6)] * 2, [(12, 8), (5, 6)]


def compared(structure, tokens, activation, dtype=torch.float32, bias=True, sizes=(2, 3, 8, 10, 6)):
    x, *tensors = (t.detach() for t in make_inputs(structure, tokens, *sizes, dtype, bias=bias))
    kernel, eager = FUNCTIONS[structure]
    with torch.no_grad():
        return kernel(x, *tensors, impl="triton", activation=activation), activated(eager(x, *tensors), activation)


@interpreted
@pytest.mark.parametrize("tokens", [1, 5, 37])
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_every_activation_in_every_last_stage(structure, activation, tokens):
    pytest.importorskip("triton")
    for bias in (True, False):
        torch.testing.assert_close(*compared(structure, tokens, activation, bias=bias), rtol=2e-5, atol=2e-5)


@interpreted
def test_in_the_stage_that_mixes(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("hf_blr.ops.rules.blast.fuses_mix", lambda *sizes: True)
    torch.testing.assert_close(*compared("blast", 37, "gelu"), rtol=2e-5, atol=2e-5)


@interpreted
def test_in_the_programs_that_loop(monkeypatch):
    pytest.importorskip("triton")
    from hf_blr.ops.rules.few_tokens import DecodeConfig
    from hf_blr.ops.triton import decode_expand

    monkeypatch.setattr(decode_expand, "expand_config", lambda *sizes: DecodeConfig(4, 16, 2, 1, programs=1))
    torch.testing.assert_close(*compared("blast", 5, "silu"), rtol=2e-5, atol=2e-5)


@interpreted
def test_half_precision_rounds_once():
    pytest.importorskip("triton")
    got, _ = compared("monarch", 37, "gelu", torch.float16)
    x, *tensors = (t.detach().double() for t in make_inputs("monarch", 37, 2, 3, 8, 10, 6, torch.float16))
    exact = torch.nn.functional.gelu(FUNCTIONS["monarch"][1](x, *tensors))
    assert (got - exact).norm() <= 3 * torch.finfo(torch.float16).eps * exact.norm()


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_with_a_gradient(structure):
    """The activation stands behind the op then; dense and reference have it too."""
    outs = []
    for impl in ("reference", "dense"):
        tensors = make_inputs(structure, 3, 2, 3, 8, 10, 6, torch.float64)
        out = FUNCTIONS[structure][0](*tensors, impl=impl, activation="silu")
        out.square().sum().backward()
        outs.append([out.detach(), *(t.grad for t in tensors if t.is_floating_point())])
    torch.testing.assert_close(*outs)


@interpreted
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_kernels_with_a_gradient(structure):
    pytest.importorskip("triton")
    grads = []
    for impl in ("reference", "triton"):
        tensors = make_inputs(structure, 35, 2, 3, 8, 10, 6, torch.float32)
        FUNCTIONS[structure][0](*tensors, impl=impl, activation="gelu_tanh").square().sum().backward()
        grads.append([t.grad for t in tensors if t.is_floating_point()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 37])
@pytest.mark.parametrize("structure", GROUPED)
def test_gated_layers_keep_the_error_budget(structure, tokens, bias):
    pytest.importorskip("triton")
    for sizes in (EQUAL, [(9, 32)] * 2):
        assert_gated_within_budget(structure, tokens, sizes, bias=bias)


@interpreted
@pytest.mark.parametrize("structure", GROUPED)
def test_gated_layers_that_lie_apart(structure):
    pytest.importorskip("triton")
    for tokens in (1, 37):
        assert_gated_within_budget(structure, tokens, [(9, 32)] * 2, packed=False)


@interpreted
def test_one_token_of_gated_layers_takes_two_launches(monkeypatch):
    pytest.importorskip("triton")
    from hf_blr.ops.triton import grouped

    calls, last = [], grouped.expand_one
    monkeypatch.setattr(grouped, "expand_one", lambda *a, **k: calls.append(k) or last(*a, **k))
    for structure in GROUPED:
        assert_gated_within_budget(structure, 1, [(9, 32)] * 2)
    assert calls == [{"gated": True}] * len(GROUPED)


def test_the_reference_of_gated_layers():
    x, gate, up = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (5, 2), (5, 2)))
    v = torch.randn(2, 4, dtype=torch.float64)
    expected = torch.nn.functional.silu(x @ v.T @ gate.T) * (x @ v.T @ up.T)
    torch.testing.assert_close(ops.gated_linear("low_rank", x, [(gate, v), (up, v)]), expected)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.low_rank_linear(torch.randn(2, 4), torch.randn(3, 2), torch.randn(2, 4), activation="tanh")
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.gated_linear("low_rank", torch.randn(2, 4), [(torch.randn(3, 2), torch.randn(2, 4))] * 2, activation="x")
