"""The reference ops against the matrices they stand for, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, INDEX, Blast, LowRank, Monarch, Pivoted, structures
from hf_blr.structures.blast.reference import blast_dense, blast_linear
from hf_blr.structures.low_rank.reference import low_rank_linear
from hf_blr.structures.monarch.reference import monarch_dense, monarch_linear
from hf_blr.structures.pivoted.reference import pivoted_linear

OPS = {
    "low_rank": low_rank_linear,
    "pivoted": pivoted_linear,
    "monarch": monarch_linear,
    "blast": blast_linear,
}
SPECS = [
    LowRank(7, 5, 3),
    Pivoted(7, 5, 3),
    Pivoted(3, 5, 3),
    Monarch(6, 10, 2, (3, 2)),
    Monarch(5, 4, 3, (1, 4)),
    Blast(6, 10, 4, (3, 5)),
    Blast(7, 9, 2, (1, 3)),
]


def ids(spec):
    return f"{spec.structure}-{spec.in_features}-{spec.out_features}-r{spec.rank}"


def random_factors(spec, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in spec.shapes(FACTOR).values()]
    return factors + [torch.randperm(k, generator=generator).int() for (k,) in spec.shapes(INDEX).values()]


def differentiable(tensors):
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


def dense_of(spec, factors):
    """The matrix, written with loops over blocks straight from the definitions."""
    (b1, b2), (p, q), r = spec.num_blocks, spec.block_shape, spec.rank
    if spec.structure == "low_rank":
        return factors[0] @ factors[1]
    if spec.structure == "pivoted":
        u, c, order = factors
        dense = torch.empty(spec.out_features, spec.in_features, dtype=u.dtype)
        for place, feature in enumerate(order.tolist()):
            dense[:, feature] = u[:, place] if place < r else u @ c[:, place - r]
        return dense
    out = torch.zeros(spec.out_features, spec.in_features, dtype=factors[0].dtype)
    for i in range(b2):
        for j in range(b1):
            if spec.structure == "monarch":
                u, v = factors
                block = u[i][:, j * r : (j + 1) * r] @ v[j][i * r : (i + 1) * r]
            else:
                u, s, v = factors
                block = u[i] @ torch.diag(s[i, j]) @ v[j]
            out[i * q : (i + 1) * q, j * p : (j + 1) * p] = block
    return out


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_op_is_multiplication_by_the_dense_matrix(spec, lead, bias):
    factors = random_factors(spec)
    x = torch.randn(*lead, spec.in_features, dtype=torch.float64)
    b = torch.randn(spec.out_features, dtype=torch.float64) if bias else None
    got = OPS[spec.structure](x, *factors, bias=b)
    assert got.shape == (*lead, spec.out_features)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, dense_of(spec, factors), b))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    structure=st.sampled_from(sorted(structures())),
    p=st.integers(1, 5),
    q=st.integers(1, 5),
    b1=st.integers(1, 4),
    b2=st.integers(1, 4),
    rank=st.integers(1, 6),
    tokens=st.integers(0, 5),
)
def test_any_sizes(structure, p, q, b1, b2, rank, tokens):
    blocks = (1, 1) if structure in ("low_rank", "pivoted") else (b1, b2)
    rank = min(rank, p, q) if structure == "pivoted" else rank
    spec = structures()[structure].spec(p * blocks[0], q * blocks[1], rank, blocks)
    factors = random_factors(spec)
    dense = dense_of(spec, factors)
    torch.testing.assert_close(implementation_of(structure).dense(*factors), dense)
    x = torch.randn(tokens, spec.in_features, dtype=torch.float64)
    torch.testing.assert_close(OPS[structure](x, *factors), x @ dense.T)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_gradients(spec):
    factors = differentiable(random_factors(spec))
    x = torch.randn(2, 3, spec.in_features, dtype=torch.float64, requires_grad=True)
    b = torch.randn(spec.out_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: OPS[spec.structure](*a[:-1], bias=a[-1]), (x, *factors, b))


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_stays_near_float64(spec, dtype):
    factors = random_factors(spec, dtype)
    x = torch.randn(5, spec.in_features).to(dtype)
    exact = x.double() @ dense_of(spec, [f.double() if f.is_floating_point() else f for f in factors]).T
    got = OPS[spec.structure](x, *factors)
    assert got.dtype == dtype
    # three roundings on the way: y, z and the result
    assert (got.double() - exact).norm() <= 3 * torch.finfo(dtype).eps * exact.norm() + 1e-12


def test_inputs_need_not_be_contiguous():
    spec = Blast(6, 10, 4, (3, 5))
    factors = random_factors(spec)
    x = torch.randn(6, 2, 8, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(OPS["blast"](x, *factors), x @ dense_of(spec, factors).T)


def test_blast_with_equal_s_is_low_rank_and_with_a_pattern_is_monarch():
    u, v = random_factors(LowRank(6, 10, 4))
    blast = blast_dense(
        u.view(5, 2, 4), torch.ones(5, 3, 4, dtype=u.dtype), v.view(4, 3, 2).transpose(0, 1).contiguous()
    )
    torch.testing.assert_close(blast, u @ v)
    # rank index (i, j): s picks it for the block pair (i, j) alone
    spec = Monarch(4, 6, 1, (2, 3))
    mu, mv = random_factors(spec)
    s = torch.eye(6, dtype=u.dtype).view(3, 2, 6)
    us = torch.zeros(3, 2, 6, dtype=u.dtype)
    vs = torch.zeros(2, 6, 2, dtype=u.dtype)
    for i in range(3):
        for j in range(2):
            us[i, :, 2 * i + j] = mu[i][:, j]
            vs[j, 2 * i + j] = mv[j][i]
    torch.testing.assert_close(blast_dense(us, s, vs), monarch_dense(mu, mv))
