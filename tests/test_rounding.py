"""Rounding in the metric of the inputs: the algorithm, what structures make of it, and that compressions use it."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from format_cases import SMALL_SPECS
from tiny import batches_for, divergence, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from hf_blr import BLRConfig, compress, structures
from hf_blr.compression import ahead
from hf_blr.factorize import FitOptions, factorize, relative_error, roots, with_codes
from hf_blr.factorize.bits import ToRound, coupling_of, refitted, rotation
from hf_blr.factorize.columns import column_blocks, round_columns
from hf_blr.factorize.gram import damped
from hf_blr.factorize.rounding import rounded_in_metric
from hf_blr.factorize.row_blocks import DAMPING, ROW_BLOCKS, upper_root
from hf_blr.formats import Bits, Codes, format_named
from hf_blr.integration import blr_modules
from hf_blr.linear import BLRLinear
from hf_blr.ops.table import implementation_of
from hf_blr.ops.triton import side_by_side
from hf_blr.structures import Blast, LowRank, Pivoted, structure_named

FORMATS = [("int8", None), ("int4", None), ("int4", 8), ("int3", 8), ("int2", 8), ("fp8", None)]
OPTIONS = FitOptions(rounds=4, damping=1e-3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k, seed=1, spread=1.3):
    """The Gram matrix `[k, k]` of inputs of which a few directions carry most."""
    x = normal(8 * k, k, seed=seed) * torch.logspace(0, -spread, k)
    x = x @ torch.linalg.qr(normal(k, k, seed=seed + 1))[0]
    return x.T @ x


def rounds_to_nearest(monkeypatch):
    """From here on, structures choose no codes."""
    for name in ("low_rank", "dense"):
        monkeypatch.setitem(structures._records, name, replace(structure_named(name), rounding=""))


def cost(change, gram):
    return ((change @ gram) * change).sum().item()


def slowly(factor, gram, storage):
    """GPTQ of `[n, k]` by its definition: the best columns behind i for an error in i, from the inverse of H each time.

    Everything in float64, without blocks and without a Cholesky factor.
    """
    left, gram = factor.double().clone(), gram.double()
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    size = storage.group_size or factor.shape[1]
    scales = []
    for i in range(factor.shape[1]):
        if i % size == 0:
            scales.append(storage.scales(left[:, i : i + size].float()))
        inverse = torch.linalg.inv(gram[i:, i:])
        numbers = storage.rounded(left[:, i : i + 1], scales[-1]).numbers(torch.float64)
        error = (left[:, i : i + 1] - numbers) / inverse[0, 0]
        left[:, i:] -= error * inverse[0]
        left[:, i : i + 1] = numbers
    return storage.rounded(left, torch.cat(scales, 1))


@pytest.mark.parametrize("name, size", [("int4", None), ("int4", 32), ("int3", 96), ("int3", 160), ("fp8", None)])
def test_it_is_gptq_by_its_definition(name, size):
    # more columns than one block of updates, and groups that begin in one and end in the next
    k = 480 if size == 96 else 320
    storage, factor, gram = format_named(name, size), normal(6, k), correlated(k)
    # in float64, where no number lies so close to the middle of two codes that sums in another order move it
    found, expected = rounded_in_metric(factor.double(), gram, storage), slowly(factor, gram, storage)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.values.float(), expected.values.float())


def test_blocks_of_columns_hold_whole_groups_or_lie_in_one():
    assert column_blocks(240, 48) == [(0, 96), (96, 192), (192, 240)]
    assert column_blocks(320, 160) == [(0, 128), (128, 160), (160, 288), (288, 320)]
    assert column_blocks(300, 300) == [(0, 128), (128, 256), (256, 300)] and column_blocks(5, 5) == [(0, 5)]


def damped_by(gram, damping):
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))


def slowly_in_both(factor, gram, rows, storage):
    """The feedback between rows by its definition: blocks that are rounded move all rows behind them to the best place.

    Everything in float64, one block of rows after the other.
    """
    numbers, target, metric = torch.zeros_like(factor), factor.clone(), damped_by(rows, DAMPING)
    scale = None
    done = torch.zeros(len(factor), dtype=torch.bool)
    for b in range(ROW_BLOCKS):
        own = torch.arange(len(factor))[b::ROW_BLOCKS]
        if not len(own):
            break
        codes = slowly(target[own], gram, storage)
        scale = codes.scale.new_zeros(len(factor), codes.scale.shape[1]) if scale is None else scale
        numbers[own], scale[own] = codes.numbers(torch.float64), codes.scale
        done[own] = True
        behind, lost = (~done).nonzero().flatten(), target[own] - numbers[own]
        target[behind] += torch.linalg.solve(metric[behind][:, behind], metric[behind][:, own] @ lost)
    return storage.rounded(numbers, scale)


@pytest.mark.parametrize("rows", [1, 5, 20, 24])
@pytest.mark.parametrize("name, size", [("int4", None), ("int3", 32), ("int2", 16)])
def test_feedback_between_rows_is_that_of_its_definition(name, size, rows):
    # several blocks of columns, but where one scale serves a whole row: it is chosen before all rows have moved
    k = 96 if size is None else 288
    storage, factor, gram, metric = format_named(name, size), normal(rows, k), correlated(k), correlated(rows, seed=4)
    found = rounded_in_metric(factor.double(), gram, storage, metric)
    expected = slowly_in_both(factor.double(), gram, metric, storage)
    assert torch.equal(found.scale, expected.scale) and torch.equal(found.values, expected.values)


@pytest.mark.parametrize("size, k", [(16, 144), (384, 768), (None, 300)])
def test_rows_that_nothing_couples_are_rounded_by_themselves(size, k):
    # also where blocks of columns differ, and blocks of rows that go on together with them
    storage, factor, gram = format_named("int4", size), normal(20, k), correlated(k)
    alone = rounded_in_metric(factor, gram, storage)
    for rows in (torch.eye(20), torch.diag(torch.logspace(0, 2, 20))):
        assert torch.equal(rounded_in_metric(factor, gram, storage, rows).values, alone.values)


@pytest.mark.parametrize("name, size", FORMATS)
def test_feedback_between_rows_costs_the_outputs_less(name, size):
    storage, factor, gram, rows = format_named(name, size), normal(24, 64), correlated(64), correlated(24, seed=4)
    one, both = (rounded_in_metric(factor, gram, storage, m).numbers(torch.float32) - factor for m in (None, rows))
    assert (rows @ both @ gram * both).sum() < 0.7 * (rows @ one @ gram * one).sum()


class Operations(TorchDispatchMode):
    """Counts what a GPU would have to start: operations that write a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, size, most", [("int4", 64, 5.5), ("int4", None, 5.5), ("fp8", None, 6.5)])
def test_a_column_takes_few_operations(name, size, most):
    """On a GPU, rounding takes as long as starting them."""
    k = 512
    storage, factor, gram = format_named(name, size), normal(16, k), correlated(k)
    with Operations() as counted:
        rounded_in_metric(factor, gram, storage)
    assert counted.count < most * k


@pytest.mark.parametrize("name, size", FORMATS)
def test_it_beats_the_nearest_codes_on_correlated_inputs(name, size):
    storage, factor, gram = format_named(name, size), normal(16, 64), correlated(64)
    nearest = storage.nearest(factor).numbers(torch.float32) - factor
    careful = rounded_in_metric(factor, gram, storage).numbers(torch.float32) - factor
    assert cost(careful, gram) < 0.6 * cost(nearest, gram)


def test_blocks_are_rounded_like_one_after_the_other():
    storage, factors = format_named("int4", 16), normal(3, 8, 48)
    grams = torch.stack([correlated(48, seed) for seed in (1, 3, 5)])
    metrics = torch.stack([correlated(8, seed) for seed in (2, 4, 6)])
    found = rounded_in_metric(factors.double(), grams, storage, metrics)
    for i in range(3):
        alone = rounded_in_metric(factors[i].double(), grams[i], storage, metrics[i])
        assert torch.equal(found.values[i], alone.values) and torch.equal(found.scale[i], alone.scale)


def test_without_correlation_or_a_gram_codes_are_the_nearest():
    storage, factor = format_named("int4", 16), normal(8, 48)
    nearest = storage.nearest(factor)
    for gram in (None, torch.diag(torch.logspace(0, 2, 48))):
        assert torch.equal(rounded_in_metric(factor, gram, storage).values, nearest.values)


def test_weights_of_rows_change_nothing():
    """A row that the loss feels ten times more gets the same codes: only what couples rows could change them."""
    storage, factor, gram = format_named("int4"), normal(8, 48), correlated(48)
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0] * 2).unsqueeze(1)
    plain, weighed = (rounded_in_metric(f, gram, storage) for f in (factor, factor * weights))
    assert torch.equal(plain.values, weighed.values)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.structure)
def test_roots_of_one_layer_are_found_once_and_change_no_code(spec, monkeypatch):
    weight, gram, output_gram, numbers = fitted(spec)
    gram, taken = damped(gram, OPTIONS.damping), []
    coupling = coupling_of(output_gram, spec.num_blocks[1], OPTIONS.damping, spec.in_features)

    def counted(matrix):
        taken.append(matrix.shape)
        return upper_root(matrix)

    monkeypatch.setattr(roots, "upper_root", counted)
    found, known = [], roots.Roots()
    for name in ("int4", "int3"):
        for shared in (known, roots.Roots()):
            problem = ToRound(weight, gram, None, coupling, format_named(name, 8), OPTIONS.seed, shared)
            found.append(with_codes(numbers, spec, problem).tensors)
            taken.append(None)
    for with_it, alone in (found[:2], found[2:]):
        for key, codes in with_it.items():
            assert all(torch.equal(a, b) for a, b in zip(codes, alone[key], strict=True))
    # of the inputs, where the whole Gram is that of a factor
    counts = [taken[: taken.index(None)].count(gram.shape), taken.count(gram.shape)]
    whole = spec.structure in ("dense", "low_rank")
    assert counts == ([1, 3] if whole else [0, 0])


def test_a_direction_without_inputs_is_no_obstacle():
    storage, factor, gram = format_named("int4"), normal(8, 48), correlated(48)
    gram[:5], gram[:, :5] = 0, 0
    numbers = rounded_in_metric(factor, gram, storage).numbers(torch.float32)
    assert torch.isfinite(numbers).all()
    assert cost(numbers - factor, gram) < cost(storage.nearest(factor).numbers(torch.float32) - factor, gram)


def test_formats_that_are_tried_share_their_rotations(monkeypatch):
    """Of a rank each is a decomposition on the CPU: a third of the time of a budget's trials on a GPU."""
    made, decompose = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda noise: made.append(noise) or decompose(noise))
    like = torch.zeros(1)
    first = rotation(29, 5, like)
    assert torch.equal(rotation(29, 5, like), first) and len(made) == 1
    rotation(29, 5, like, 2)
    assert len(made) == 2


def test_a_rotation_leaves_the_matrix_as_it_is():
    u, v = normal(24, 8).double(), normal(8, 32, seed=1).double()
    turn = rotation(8, 0, v)
    torch.testing.assert_close(u @ turn.T @ (turn @ v), u @ v, rtol=1e-12, atol=1e-12)
    pairs = rotation(8, 0, v, 3, 2)
    torch.testing.assert_close(pairs @ pairs.mT, torch.eye(8).double().expand(3, 2, 8, 8), rtol=0.0, atol=1e-12)
    assert not torch.allclose(pairs[0, 0], pairs[1, 0])
    assert torch.equal(turn, rotation(8, 0, v)) and not torch.equal(turn, rotation(8, 1, v))


def test_the_refit_is_the_best_there_is():
    weight, rows, gram = normal(24, 32).double(), normal(8, 32, seed=1).double(), correlated(32).double()
    u, normal_matrix = refitted(weight, rows, gram)
    torch.testing.assert_close(normal_matrix, rows @ gram @ rows.T)
    root = torch.linalg.cholesky(gram)
    expected = torch.linalg.lstsq((rows @ root).T, (weight @ root).T).solution.T
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-8)


@cache
def fitted(spec, weighed=True):
    output_gram = correlated(spec.out_features, seed=7)[None] if weighed else None
    weight = normal(spec.out_features, spec.in_features) @ torch.diag(torch.logspace(0, -1, spec.in_features))
    gram = correlated(spec.in_features)
    return weight, gram, output_gram, factorize(weight, spec, gram, output_gram, OPTIONS)


def nearest_error(spec, storage, weight, gram, numbers):
    """Of factors that all go to their nearest codes."""
    rounded = {
        name: storage.nearest(t).numbers(torch.float32) if name in storage.in_bits(spec) else t
        for name, t in numbers.tensors.items()
    }
    matrix = implementation_of(spec.structure).dense(**rounded)
    return relative_error(weight, matrix, None if gram is None else damped(gram, OPTIONS.damping))


@pytest.mark.parametrize("name, size", FORMATS)
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.structure)
def test_every_structure_loses_less_than_by_the_nearest_codes(spec, name, size):
    storage = format_named(name, size)
    # without weights of outputs, under which the error that is reported is not the one that is fitted
    weight, gram, output_gram, numbers = fitted(spec, weighed=False)
    found = factorize(weight, spec, gram, output_gram, OPTIONS, storage)
    assert {key for key, t in found.tensors.items() if isinstance(t, Codes)} == set(storage.in_bits(spec))
    assert found.rel_error < nearest_error(spec, storage, weight, gram, numbers)


@pytest.mark.parametrize("spec", SMALL_SPECS[:-1], ids=lambda spec: spec.structure)
def test_fits_to_weights_alone_gain_too(spec):
    storage = format_named("int3", 8)
    weight = fitted(spec)[0]
    numbers = factorize(weight, spec, options=OPTIONS)
    found = factorize(weight, spec, options=OPTIONS, storage=storage)
    assert found.rel_error < nearest_error(spec, storage, weight, None, numbers)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.structure)
def test_the_error_that_is_reported_is_that_of_what_is_stored(spec):
    storage = format_named("int4", 8)
    weight, gram, output_gram, _ = fitted(spec)
    found = factorize(weight, spec, gram, output_gram, OPTIONS, storage)
    layer = BLRLinear.from_fit(spec, found.tensors, torch.nn.Linear(48, 32), storage)
    stored = relative_error(weight, layer.dense_weight(torch.float32).detach(), damped(gram, OPTIONS.damping))
    assert found.rel_error == pytest.approx(stored, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_the_weight_does_not_matter(scale):
    spec, storage = SMALL_SPECS[0], format_named("int4", 8)
    weight, gram, output_gram, _ = fitted(spec)
    found = factorize(weight * scale, spec, gram, output_gram, OPTIONS, storage)
    expected = factorize(weight, spec, gram, output_gram, OPTIONS, storage).rel_error
    # bfloat16 has scales of other last digits there
    assert found.rel_error == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("step", ["refit", "rotation"])
def test_each_step_helps(step, monkeypatch):
    """Without the refit u is the one that was fitted; without the rotation few indices of the rank carry most."""
    spec, storage = LowRank(48, 32, 16), format_named("int3", 8)
    errors = []
    for with_it in (True, False):
        if not with_it and step == "rotation":
            monkeypatch.setattr(
                "hf_blr.structures.low_rank.rounding.rotation", lambda rank, seed, like: torch.eye(rank).to(like)
            )
        if not with_it and step == "refit":
            weight, gram, output_gram, numbers = fitted(spec, weighed=False)
            turn = rotation(16, OPTIONS.seed, numbers.tensors["v"])
            u, v = numbers.tensors["u"] @ turn.T, turn @ numbers.tensors["v"]
            v_codes = rounded_in_metric(v, damped(gram, OPTIONS.damping), storage).numbers(torch.float32)
            u_codes = rounded_in_metric(u, v @ damped(gram, OPTIONS.damping) @ v.T, storage).numbers(torch.float32)
            errors.append(relative_error(weight, u_codes @ v_codes, damped(gram, OPTIONS.damping)))
            continue
        total = 0.0
        for seed in range(4):
            weight, gram, output_gram, _ = fitted(spec, weighed=False)
            total += factorize(weight, spec, gram, None, FitOptions(damping=1e-3, seed=seed), storage).rel_error
        errors.append(total / 4)
    assert errors[0] < 0.99 * errors[1]


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.structure)
def test_every_structure_rounds_in_the_metric_of_its_outputs(spec, monkeypatch):
    storage = format_named("int3", 8)
    weight, gram, output_gram, numbers = fitted(spec)
    metric = output_gram[0]
    metric = torch.block_diag(
        *(metric[i : i + 32 // b, i : i + 32 // b] for b in (spec.num_blocks[1],) for i in range(0, 32, 32 // b))
    )

    def loss(given):
        change = factorize(weight, spec, gram, given, OPTIONS, storage).matrix(spec) - numbers.matrix(spec)
        return ((metric @ change) * (change @ damped(gram, OPTIONS.damping))).sum().item()

    both = loss(output_gram)
    monkeypatch.setattr(ToRound, "round", lambda problem, factor, gram, rows: rounded_in_metric(factor, gram, storage))
    assert both < 0.9 * loss(output_gram)


def test_what_outputs_say_of_each_other_is_damped_by_half_at_least():
    gram = correlated(32, seed=7)
    unit = gram.double() / gram.double().diagonal().mean()
    (found,) = coupling_of(gram[None], 1, 0.02, 128)
    torch.testing.assert_close(found, unit + 0.5 * torch.eye(32))
    # of so few tokens that their number alone asks for more
    (found,) = coupling_of(gram[None], 1, 1.4, 128)
    torch.testing.assert_close(found, unit + 0.7 * torch.eye(32))
    halves = coupling_of(gram[None], 2, 0.02, 128)
    torch.testing.assert_close(halves[1], (unit + 0.5 * torch.eye(32))[16:, 16:])
    # never more than the diagonal itself
    assert coupling_of(gram[None], 1, 0.9, 8)[0].diagonal().mean() == pytest.approx(2)
    assert coupling_of(None, 1, 0.1, 8) is None and coupling_of(torch.zeros(1, 32, 32), 1, 0.1, 8) is None


def test_feedback_between_rows_helps_where_a_few_tokens_make_most_of_the_fisher_matrix():
    """Judged by the matrix of infinitely many tokens. With damping by their number alone it hurts."""
    n, k, tokens, storage = 48, 64, 20000, format_named("int4", 32)
    sizes = torch.linspace(1, tokens, tokens).pow(-0.75).unsqueeze(1)
    ratios = []
    for seed in range(3):
        true = correlated(n, seed=11 + seed, spread=0.5)
        gradients = sizes * (normal(tokens, n, seed=5 + seed) @ torch.linalg.cholesky(true).T)
        coupling = coupling_of((gradients.T @ gradients)[None], 1, (k / tokens) ** 0.5, k)
        weight, gram = normal(n, k, seed=seed), correlated(k)
        changes = (
            rounded_in_metric(weight, gram, storage, m).numbers(torch.float32) - weight for m in (coupling, None)
        )
        both, alone = ((true @ change * (change @ gram)).sum().item() for change in changes)
        ratios.append(both / alone)
    assert sum(ratios) / 3 < 1


def test_blast_solves_s_in_the_metric_of_the_outputs():
    spec, storage = Blast(48, 32, 16, (2, 2)), format_named("int3", 8)
    weight, gram, output_gram, _ = fitted(spec)
    losses = []
    for given in (output_gram, None):
        change = weight - factorize(weight, spec, gram, given, OPTIONS, storage).matrix(spec)
        metric = torch.block_diag(output_gram[0, :16, :16], output_gram[0, 16:, 16:])
        losses.append(((metric @ change) * (change @ gram)).sum().item())
    assert losses[0] < losses[1]


def test_a_structure_without_a_way_of_its_own_takes_the_nearest_codes(monkeypatch):
    spec, storage = SMALL_SPECS[0], format_named("int4", 8)
    weight, gram, _, _ = fitted(spec)
    rounds_to_nearest(monkeypatch)
    found = factorize(weight, spec, gram, None, OPTIONS, storage)
    numbers = factorize(weight, spec, gram, None, OPTIONS).tensors
    assert all(torch.equal(found.tensors[key].values, storage.nearest(numbers[key]).values) for key in ("u", "v"))


def test_pivots_that_are_all_features_leave_nothing_but_u():
    spec, storage = Pivoted(16, 48, 16), format_named("int8", 8)
    weight = normal(48, 16)
    found = factorize(weight, spec, correlated(16), storage=storage)
    assert found.tensors["c"].shape == (16, 0) and isinstance(found.tensors["u"], Codes)
    assert found.rel_error < 0.01


def test_eight_bits_with_one_scale_a_row_add_nothing_to_what_a_rank_cuts_off():
    weight, gram = normal(96, 128), correlated(128)
    plain, rows = (factorize(weight, LowRank(128, 96, 24), gram, storage=format_named(f)) for f in ("plain", "int8"))
    assert rows.rel_error < 1.001 * plain.rel_error


def test_groups_that_do_not_divide_rows_are_refused():
    with pytest.raises(ValueError, match="which groups of 7 do not divide"):
        factorize(torch.ones(32, 48), SMALL_SPECS[0], storage=format_named("int4", 7))


CONFIGS = [
    BLRConfig("dense", dense_format="int4", group_size=16),
    BLRConfig("low_rank", ratio=0.9, factor_format="int4", dense_format="int4"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.structure)
def test_compressions_round_with_care(config, monkeypatch):
    """Whole matrices, factors, and what a budget leaves whole."""
    dense = tiny_llama()
    batches = batches_for(dense, count=4)
    found = []
    for nearest in (False, True):
        if nearest:
            rounds_to_nearest(monkeypatch)
        model = tiny_llama()
        report = compress(model, config, calibration=batches, progress=False)
        assert "dense" in {layer.spec.structure for layer in report.layers}
        found.append(divergence(dense, model, batches))
    assert found[0] < 0.9 * found[1]


def test_later_layers_are_fitted_to_what_the_codes_of_earlier_ones_give_them(monkeypatch):
    config = BLRConfig("dense", dense_format="int2", fisher=False)
    model = tiny_llama()
    seen = {}

    def spy(problem, factor, gram, rows):
        assert rows is None
        seen[len(seen)] = gram.clone()
        return rounded_in_metric(factor, gram, problem.storage)

    monkeypatch.setattr(ToRound, "round", spy)
    batches = batches_for(model, count=2)
    report = compress(model, config, calibration=batches, progress=False)
    name = "model.layers.1.mlp.gate_proj"
    entered = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: entered.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat(entered)
    # every layer before it is in its final form when its turn comes
    order = [layer.name for layer in report.layers].index(name)
    mean = (x.T @ x).diagonal().mean()
    found = seen[order] - (seen[order].diagonal().mean() - 1) * torch.eye(len(seen[order]))
    options = config.fit_options(x.shape[1], len(x))
    expected = damped(x.T @ x, options.damping) / ((1 + options.damping) * mean)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert all(module.storage.name == "int2" for module in blr_modules(model).values())


def test_what_fits_in_bits_run_is_compiled_for_each_format(monkeypatch):
    int4, fp8 = format_named("int4"), format_named("fp8")
    formats = [replace(int4, group_size=64), replace(int4, group_size=256), fp8]
    seen, given, inside = [], [], []

    @contextmanager
    def compiling(threads):
        inside.append(threads)
        yield
        inside.clear()

    def rounds(columns, upper, storage, scale):
        assert inside
        seen.append((storage, scale is None))
        return round_columns(columns, upper, storage, scale)

    numbers = Bits.numbers
    monkeypatch.setattr(side_by_side, "compiling", compiling)
    monkeypatch.setattr(ahead, "round_columns", rounds)
    monkeypatch.setattr(Bits, "numbers", lambda *args: given.append(args[0]) or numbers(*args))
    ahead.compile_rounding(formats, torch.device("cpu"))
    assert not seen
    monkeypatch.setattr(ahead, "runs_kernel", lambda columns: True)
    ahead.compile_rounding(formats, torch.device("cpu"))
    # a group that is wider than a block has its scale before the block is rounded
    assert seen == [(formats[0], True), (formats[1], False), (formats[2], False)]
    # 256 does not divide 384
    assert given == [formats[0], formats[0], formats[1], formats[2], formats[2]]
