"""Experts that run together give what the loop over them gives: sorted, by the kernel, with gradients, compiled."""

import pytest
import torch
from expert_cases import STRUCTURES, make_experts, make_tokens
from torch.utils.flop_counter import FlopCounterMode

from hf_blr import ops
from hf_blr.ops.dispatch import triton_problem
from hf_blr.ops.expert_products import is_aligned
from hf_blr.structures import structure_named

each = pytest.mark.parametrize("structure", STRUCTURES)


def assert_close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("tokens", [0, 1, 7, 60])
def test_all_rows_together_give_what_the_loop_gives(structure, tokens):
    torch.manual_seed(0)
    experts = make_experts(structure)
    given = make_tokens(experts, tokens, last=1)
    wanted = experts.one_by_one(*given)
    assert_close(experts(*given), wanted)
    for impl in ("reference", "dense"):
        with ops.use_impl(impl):
            assert_close(experts(*given), wanted)


@each
@pytest.mark.skipif(triton_problem() is not None, reason="needs Triton")
@pytest.mark.parametrize("tokens, dtype", [(1, torch.float32), (6, torch.float16)])
def test_the_kernel_for_few_rows_gives_what_the_loop_gives(structure, tokens, dtype):
    torch.manual_seed(0)
    experts = make_experts(structure, dtype=dtype)
    x, choice, weights = make_tokens(experts, tokens)
    with torch.no_grad():
        wanted = experts.double().one_by_one(x.double(), choice, weights.double())
        with ops.use_impl("triton"):
            found = experts.to(dtype)(x, choice, weights)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]


@pytest.mark.skipif(triton_problem() is not None, reason="needs Triton")
def test_the_kernel_takes_matrices_that_lie_the_other_way_and_experts_that_are_none():
    torch.manual_seed(0)
    x, w = torch.randn(4, 1, 37), torch.randn(3, 37, 21).mT
    chosen = torch.tensor([2, 0, 3, 0])
    out = torch.ops.hf_blr.expert_rows(x, w[:, None], chosen)[:, 0]
    wanted = torch.einsum("sk,snk->sn", x[:, 0], w[chosen.clamp(max=2)])
    wanted[2] = 0
    assert_close(out, wanted)
    column = torch.stack([chosen, chosen.flip(0)], 1)[:, 0]
    assert_close(torch.ops.hf_blr.expert_rows(x, w[:, None], column)[:, 0], wanted)


@each
def test_gradients_are_those_of_the_loop(structure):
    torch.manual_seed(0)
    experts = make_experts(structure)
    x, choice, weights = make_tokens(experts, 9, last=1)
    found = []
    for run in (experts.one_by_one, experts):
        given = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        experts.zero_grad()
        # a sum would hand back gradients without strides of their own, which no layer behind this one does
        run(given[0], choice, given[1]).square().sum().backward()
        found.append([*(t.grad for t in given), *(p.grad.clone() for p in experts.parameters())])
    assert len(found[0]) == 2 + len(list(experts.parameters()))
    for actual, wanted in zip(found[1], found[0], strict=True):
        assert_close(actual, wanted)
    assert not any(p.grad[-1].any() for p in experts.parameters())


@pytest.mark.parametrize("structure", ["low_rank", "monarch"])
def test_it_compiles_as_one_graph(structure):
    torch.manual_seed(0)
    experts = make_experts(structure)
    given = make_tokens(experts, 7)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(compiled(*given), experts.one_by_one(*given))
    more = make_tokens(experts, 11)
    assert_close(compiled(*more), experts.one_by_one(*more))
    compiled(*more).sum().backward()
    assert all(p.grad is not None for p in experts.parameters())


@pytest.mark.parametrize("width, aligned", [(8, True), (7, False)])
def test_a_compiled_graph_may_ask_whether_rows_are_aligned(width, aligned):
    """As it does on a GPU, to choose the product."""
    x = torch.ones(3, width)
    assert is_aligned(x) == aligned
    compiled = torch.compile(lambda x: x * is_aligned(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x * aligned)


@pytest.mark.skipif(triton_problem() is not None, reason="needs Triton")
@pytest.mark.parametrize("structure", ["low_rank", "monarch"])
def test_each_number_of_an_expert_meets_each_of_its_rows(structure):
    experts = make_experts(structure)
    given = make_tokens(experts, 6)
    numbers = experts.gate_up_proj.spec.num_parameters + experts.down_proj.spec.num_parameters
    for impl, times in (("reference", 3), ("triton", 1)):
        with FlopCounterMode(display=False) as mode, ops.use_impl(impl), torch.set_grad_enabled(impl == "reference"):
            out = experts(given[0].requires_grad_(impl == "reference"), *given[1:])
            if impl == "reference":
                out.sum().backward()
        assert mode.get_total_flops() == 2 * 12 * numbers * times


def test_who_asks_for_the_loop_gets_it(monkeypatch):
    experts = make_experts("low_rank")
    given = make_tokens(experts, 3)
    ran = []
    monkeypatch.setattr(experts, "one_by_one", lambda *args: ran.append(args))
    experts(*given)
    assert not ran
    experts.config = type("Config", (), {"_experts_implementation": "eager"})()
    experts(*given)
    assert len(ran) == 1
    del experts.config
    monkeypatch.setattr(type(experts.down_proj), "alone", True)
    experts(*given)
    assert len(ran) == 2


def test_a_structure_without_a_form_for_experts_says_so():
    assert make_experts("low_rank").down_proj.alone is False
    assert structure_named("low_rank").experts


def test_asked_for_by_name_the_kernel_that_cannot_run_is_refused():
    experts = make_experts("low_rank")
    with ops.use_impl("triton"), pytest.raises(RuntimeError, match="the kernel for experts has no gradients"):
        experts(*make_tokens(experts, 3))
