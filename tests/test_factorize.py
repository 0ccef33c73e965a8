"""The fits: exact where they can be, optimal where that is known, never rising, never crashing."""

import pytest
import torch

from hf_blr.factorize import FitOptions, factorize, relative_error
from hf_blr.factorize.gram import cholesky, cholesky_in_place, conjugate_gradients, damped
from hf_blr.factorize.options import damping_of
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, Blast, LowRank, Monarch, make_spec
from hf_blr.structures.blast import fit as als
from hf_blr.structures.blast.fit import BlastProblem
from hf_blr.structures.monarch.fit import fit as fit_monarch


def random_problem(n=24, k=32, tokens=200, seed=0, dtype=torch.float64):
    """A weight and the Gram of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=dtype)
    mixing = torch.randn(k, k, generator=generator, dtype=dtype) * torch.logspace(0, -2, k, dtype=dtype)
    x = torch.randn(tokens, k, generator=generator, dtype=dtype) @ mixing.T
    return weight, x.T @ x, x


def whitened_svd(weight, x, rank):
    """The best rank-`rank` error ||(W - W') X||, from the singular values of W X."""
    return torch.linalg.svdvals(weight @ x.T)[rank:].norm() / (weight @ x.T).norm()


@pytest.mark.parametrize("n, k", [(24, 32), (32, 24), (20, 20)])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_low_rank_reaches_the_optimum_in_the_metric_of_the_inputs(n, k, rank):
    weight, gram, x = random_problem(n, k)
    u, v = low_rank_factors(weight, rank, gram)
    error = ((weight - u @ v) @ x.T).norm() / (weight @ x.T).norm()
    torch.testing.assert_close(error, whitened_svd(weight, x, rank), rtol=1e-6, atol=1e-9)


def test_low_rank_without_inputs_is_the_truncated_svd():
    weight, _, _ = random_problem()
    u, v = low_rank_factors(weight, 5)
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(u @ v, (left[:, :5] * sigma[:5]) @ right[:5])


@pytest.mark.parametrize("n, k", [(24, 32), (32, 24)])
def test_low_rank_ignores_what_a_singular_gram_never_excites(n, k):
    weight, _, _ = random_problem(n, k)
    x = torch.randn(6, k, dtype=torch.float64)
    u, v = low_rank_factors(weight, 6, x.T @ x)
    # six inputs need rank six
    torch.testing.assert_close(x @ (u @ v).T, x @ weight.T, rtol=1e-5, atol=1e-6)


def blast_losses(weight, gram, spec, rounds=12):
    factors, losses = als.fit(weight, spec, gram, FitOptions(rounds, tolerance=0.0))
    return implementation_of("blast").dense(**factors), losses


@pytest.mark.parametrize("with_gram", [True, False], ids=["activations", "weights"])
@pytest.mark.parametrize("blocks", [(2, 2), (4, 8), (8, 4), (2, 3), (4, 4)], ids=str)
def test_blast_loss_never_rises_and_is_the_error_of_its_factors(blocks, with_gram):
    weight, gram, _ = random_problem()
    gram = damped(gram, 1e-6) if with_gram else None
    metric = torch.eye(32, dtype=torch.float64) if gram is None else gram
    dense, losses = blast_losses(weight, gram, Blast(32, 24, 9, blocks))
    assert len(losses) > 2
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False))
    residual = weight - dense
    assert ((residual @ metric) * residual).sum().item() == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.parametrize("limit", [1, 500, 10**6], ids=["one-rank", "some-ranks", "all-ranks"])
def test_blast_solves_are_stationary_at_an_exact_fit(limit, monkeypatch):
    monkeypatch.setitem(als.INTERMEDIATE, "cpu", limit)
    spec = Blast(32, 24, 9, (4, 3))
    generator = torch.Generator().manual_seed(1)
    u, s, v = (torch.randn(x, generator=generator, dtype=torch.float64) for x in spec.shapes(FACTOR).values())
    _, gram, _ = random_problem()
    gram = damped(gram, 1e-3)
    problem = BlastProblem(implementation_of("blast").dense(u, s, v), gram, spec)
    state = problem.complete(s, v)
    assert state.loss == pytest.approx(0, abs=1e-8 * problem.energy.item())
    s_again, v_again = problem.alternate(state)
    torch.testing.assert_close(s_again, state.s, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(v_again, state.v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", ["many", "usual"])
def test_each_blast_solve_goes_to_the_best_of_its_factor(steps, monkeypatch):
    usual = als.S_STEPS, als.V_STEPS
    weight, gram, _ = random_problem(24, 32)
    gram = damped(gram, 1e-3)
    spec = Blast(32, 24, 9, (4, 3))
    problem = BlastProblem(weight, gram, spec)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(x, generator=generator, dtype=torch.float64) for x in spec.shapes(FACTOR).values()]

    def loss(u, s, v):
        residual = weight - implementation_of("blast").dense(u, s, v)
        return ((residual @ gram) * residual).sum()

    state = problem.complete(start[1], start[2])
    now = {"u": state.u, "s": state.s, "v": state.v}
    monkeypatch.setattr(als, "S_STEPS", 400)
    monkeypatch.setattr(als, "V_STEPS", 400)
    best = {"u": state.u, "s": problem.solve_s(state), "v": problem.solve_v(**now)}
    monkeypatch.setattr(als, "S_STEPS", usual[0])
    monkeypatch.setattr(als, "V_STEPS", usual[1])
    solved = best if steps == "many" else {"s": problem.solve_s(state), "v": problem.solve_v(**now)}
    for name, value in solved.items():
        factors = now | {name: value.clone().requires_grad_()}
        if steps == "many":
            gradient = torch.autograd.grad(loss(**factors), factors[name])[0]
            assert gradient.norm() < 1e-6 * problem.energy, name
        else:
            possible = state.loss - loss(**(now | {name: best[name]}))
            assert state.loss - loss(**factors) > 0.8 * possible, name


def test_conjugate_gradients_solve_systems_side_by_side_and_never_go_away_from_the_solution():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.mT + torch.eye(6, dtype=torch.float64)
    # one system starts at its solution, where there is nothing to divide by
    rhs, start = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    start[1] = torch.linalg.solve(matrices[1], rhs[1])
    exact = torch.linalg.solve(matrices, rhs)

    def product(x):
        return (matrices @ x.unsqueeze(-1)).squeeze(-1)

    def error(x):
        return ((x - exact) * product(x - exact)).sum(-1)

    before = error(start)
    for steps in range(1, 8):
        x = conjugate_gradients(product, rhs, start, lambda r: r, steps, dims=(1,))
        assert (error(x) <= before + 1e-20).all()
        before = error(x)
    torch.testing.assert_close(x, exact)


@pytest.mark.parametrize("error", [0.0, 2e-8])
def test_conjugate_gradients_stand_still_where_only_rounding_is_left(error):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 3, generator=generator)
    # rounding may look like curvature where the matrix sees nothing; how it does depends on the CPU
    matrix = root @ root.T + error * (root @ root.T).norm() * torch.eye(8)
    x = root @ torch.randn(3, generator=generator)
    rhs = matrix @ x
    rhs = rhs + 50 * error * rhs.norm() * torch.ones(8)
    # makes much of what the matrix does not see
    inverse = torch.linalg.inv(matrix.double() + 1e-4 * torch.eye(8, dtype=torch.float64)).float()
    for start in (torch.zeros(8), x):
        solved = conjugate_gradients(lambda v: matrix @ v, rhs, start, lambda r: inverse @ r, 50, dims=(0,))
        assert (matrix @ solved - rhs).norm() < torch.finfo(torch.float32).eps ** 0.5 * rhs.norm()
        assert solved.norm() < 10 * x.norm()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n, k", [(32, 32), (16, 32), (32, 48)])
def test_blast_comes_back_to_a_matrix_of_lower_rank(n, k, seed):
    """Where the start is exact but for its noise, most of u and v has nothing to do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, 4, generator=generator) @ torch.randn(4, k, generator=generator)
    assert factorize(weight, make_spec("blast", k, n, ratio=0.7, num_blocks=2)).rel_error < 5e-3


def test_blast_beats_low_rank_at_equal_parameters():
    weight, gram, _ = random_problem(64, 64, tokens=500)
    low_rank = factorize(weight, make_spec("low_rank", 64, 64, ratio=0.5), gram)
    blast = factorize(
        weight,
        make_spec("blast", 64, 64, ratio=0.5, num_blocks=(4, 4)),
        gram,
        options=FitOptions(rounds=40, tolerance=0.0),
    )
    assert blast.rel_error < 0.95 * low_rank.rel_error


def test_blast_recovers_a_matrix_that_is_one():
    spec = Blast(32, 32, 6, (4, 4))
    generator = torch.Generator().manual_seed(3)
    truth = implementation_of("blast").dense(
        *(torch.randn(x, generator=generator) for x in spec.shapes(FACTOR).values())
    )
    fitted = factorize(truth, spec, options=FitOptions(rounds=200, tolerance=0.0))
    # there are local minima, so not zero; low-rank of the same rank is far off
    assert fitted.rel_error < 0.2 < 0.35 < factorize(truth, LowRank(32, 32, 6)).rel_error


def test_blast_of_one_block_is_low_rank():
    weight, gram, x = random_problem()
    fitted = factorize(weight, Blast(32, 24, 9, (1, 1)), gram, options=FitOptions(damping=0.0))
    assert fitted.rel_error == pytest.approx(whitened_svd(weight, x, 9).item(), rel=1e-3)


@pytest.mark.parametrize("blocks", [(1, 1), (4, 3), (2, 8)], ids=str)
def test_monarch_error_never_rises_and_beats_blocks_fitted_alone(blocks):
    weight, gram, _ = random_problem()
    gram = damped(gram, 1e-6)
    factors, losses = fit_monarch(weight, Monarch(32, 24, 2, blocks), gram, FitOptions(rounds=8, tolerance=0.0))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(losses, losses[1:], strict=False))
    residual = weight - implementation_of("monarch").dense(**factors)
    assert ((residual @ gram) * residual).sum().item() == pytest.approx(losses[-1], rel=1e-6)
    if blocks[0] > 1:
        # losses[0] is that of the blocks fitted one by one
        assert losses[-1] < 0.8 * losses[0]


def test_monarch_without_inputs_is_the_blockwise_svd():
    weight, _, _ = random_problem()
    fitted = factorize(weight, Monarch(32, 24, 2, (4, 3)))
    tails = [torch.linalg.svdvals(b)[2:].norm() ** 2 for row in weight.split(8) for b in row.split(8, dim=1)]
    assert fitted.rel_error == pytest.approx((sum(tails) ** 0.5 / weight.norm()).item(), rel=1e-5)


@pytest.mark.parametrize(
    "structure, blocks", [("low_rank", None), ("pivoted", None), ("monarch", (4, 3)), ("blast", (4, 3))]
)
@pytest.mark.parametrize("kind", ["rank-deficient", "one-input", "dead-features", "ill-conditioned", "huge", "tiny"])
def test_difficult_grams_give_finite_factors_and_a_small_error(structure, blocks, kind):
    weight, gram, x = random_problem()
    if kind == "rank-deficient":
        gram = x[:5].T @ x[:5]
    elif kind == "one-input":
        gram = x[:1].T @ x[:1]
    elif kind == "dead-features":
        gram[:9] = gram[:, :9] = 0
    elif kind == "ill-conditioned":
        gram = torch.diag(torch.logspace(8, -8, 32, dtype=torch.float64))
    else:
        gram = gram * {"huge": 1e12, "tiny": 1e-12}[kind]
    fitted = factorize(weight, make_spec(structure, 32, 24, ratio=0.6, num_blocks=blocks), gram)
    assert all(torch.isfinite(t).all() for t in fitted.tensors.values())
    assert fitted.rel_error < 0.35
    dense = implementation_of(structure).dense(**fitted.tensors).double()
    assert relative_error(weight, dense, damped(gram, 1e-4)) == pytest.approx(fitted.rel_error, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "monarch", "blast"])
@pytest.mark.parametrize("scale", [0.0, 2.0**-40, 2.0**40])
def test_any_scale_of_weight(structure, scale):
    weight, gram, _ = random_problem()
    spec = make_spec(structure, 32, 24, ratio=0.6, num_blocks=None if structure in ("low_rank", "pivoted") else 2)
    plain, scaled = factorize(weight, spec, gram), factorize(weight * scale, spec, gram)
    dense = implementation_of(structure).dense(**scaled.tensors)
    torch.testing.assert_close(dense, implementation_of(structure).dense(**plain.tensors) * scale)


def test_more_rounds_and_tolerance_do_what_they_say():
    weight, gram, _ = random_problem(64, 64)
    spec = Blast(64, 64, 20, (4, 4))
    few, many = (factorize(weight, spec, gram, options=FitOptions(rounds=r, tolerance=0.0)) for r in (2, 10))
    assert (few.rounds, many.rounds) == (2, 10)
    assert many.rel_error < few.rel_error
    assert factorize(weight, spec, gram, options=FitOptions(rounds=50, tolerance=0.2)).rounds < 10


def test_the_same_seed_gives_the_same_factors():
    weight, gram, _ = random_problem()
    spec = Blast(32, 24, 6, (4, 4))
    first, again, other = (factorize(weight, spec, gram, options=FitOptions(seed=s)).tensors["u"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, g: (w[:5], g), r"weight must be \[24, 32\], got \(5, 32\)"),
        (lambda w, g: (w, g[:5, :5]), "Gram matrix must be"),
        (lambda w, g: (w.index_fill(0, torch.tensor([3]), float("nan")), g), "the weight: 32 of 768 values are NaN"),
        (lambda w, g: (w, g * float("inf")), "Gram matrix of the inputs holds NaN"),
        (lambda w, g: (w, g * 0), "no calibration input reached"),
    ],
)
def test_bad_input_is_refused(change, message):
    weight, gram, _ = random_problem()
    with pytest.raises(ValueError, match=message):
        factorize(*change(weight, gram)[:1], LowRank(32, 24, 3), change(weight, gram)[1])


def test_cholesky_lifts_only_the_members_that_fail():
    good = torch.eye(3, dtype=torch.float64) * 4
    singular = torch.ones(3, 3, dtype=torch.float64)
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -1e-12], dtype=torch.float64))
    factor = cholesky(torch.stack([good, singular, indefinite, torch.zeros(3, 3, dtype=torch.float64)]))
    assert torch.isfinite(factor).all()
    assert torch.equal(factor[0], good / 2)
    torch.testing.assert_close(factor[1] @ factor[1].T, singular, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rank", [40, 7])
def test_cholesky_in_place_is_the_same_in_less_memory(rank, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = torch.randn(rank, 40, dtype=torch.float64, device=device)
    gram, made = x.mT @ x, []
    gram = (gram + gram.mT) / 2

    def make():
        made.append(gram.clone())
        return made[-1]

    factor = cholesky_in_place(make)
    assert torch.equal(factor, cholesky(gram))
    # a singular one is made again
    assert (factor.data_ptr() == made[0].data_ptr()) == (rank == 40) and len(made) == 1 + (rank < 40)


def test_the_less_text_the_more_damping():
    assert damping_of(None, 576, 24000) == pytest.approx(0.155, abs=1e-3)
    assert damping_of(None, 576, 262144) == pytest.approx(0.047, abs=1e-3)
    assert damping_of(0.0, 576, 24000) == 0.0
    # fewer rows than features, or none: no more than the mean itself
    assert damping_of(None, 576, 100) == damping_of(None, 576, 0) == 1.0
