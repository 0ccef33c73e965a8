"""What the loss feels of a layer, the metric that comes of it, and the budget shared out by it."""

import copy
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import batches_for, divergence, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration.fisher import fisher_statistics
from hf_blr.calibration.losses import sampled_loss
from hf_blr.compression import layer_trials
from hf_blr.compression.allocation import Option, allocate, interpolate, loss_curve, predicted_loss
from hf_blr.compression.budget import Budget, share_budget
from hf_blr.compression.layer_trials import Layer, factor_at, trial_factors
from hf_blr.compression.shapes import at_ranks
from hf_blr.factorize import FitOptions, factorize
from hf_blr.factorize.gram import damped
from hf_blr.factorize.metric import OUTPUT_DAMPING, OutputMetric, metric_blocks, regroup
from hf_blr.linear import blr_modules
from hf_blr.ops.table import implementation_of
from hf_blr.plan import resolve_plan
from hf_blr.structures import Blast, LowRank, Monarch, make_spec

CONFIG = BLRConfig("low_rank", ratio=0.5)


def positive(n, seed=0):
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit])
def test_fisher_matrices_are_sums_of_the_gradients_of_sampled_losses(build):
    model = build()
    batches = batches_for(model, count=1)
    names = list(resolve_plan(model, CONFIG))
    statistics = fisher_statistics(model, names, batches, seed=5)
    name, tokens, expected = names[-1], 0, 0
    for i in range(8):
        batch = {key: value[i : i + 1] for key, value in batches[0].items()}
        kept = {}
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out, to=kept: to.update(out=out))
        loss, count = sampled_loss(model, batch, 5 + i)
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, kept["out"])
        rows = gradient.reshape(-1, gradient.shape[-1])
        expected, tokens = expected + rows.T @ rows, tokens + count
    torch.testing.assert_close(statistics.output_grams[name], expected[None], rtol=1e-3, atol=1e-5)
    assert statistics.tokens == tokens
    assert set(statistics.grams) == set(statistics.output_grams) == set(names)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_are_drawn_from_the_models_predictions():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return {"logits": x.expand(1, 20000, 3)}

    logits = torch.log(torch.tensor([[[0.2, 0.5, 0.3]]]))
    loss, count = sampled_loss(Fixed(), {"x": logits}, seed=0)
    entropy = -(logits.exp() * logits).sum().item()
    # the mean loss of labels drawn from a distribution is its entropy
    assert loss.item() / count == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression", None])
def test_what_is_drawn_for_a_head_follows_its_kind_of_problem(kind):
    """The mean of g g^T: p (1 - p) of single labels, 1 of numbers, diag(p) - p p^T of one class of several."""

    class Head(torch.nn.Module):
        config = SimpleNamespace(problem_type=kind)

        def forward(self, x):
            return {"logits": x}

    logits = torch.tensor([[-1.0, 0.5, 2.0]]).expand(1, 20000, 3).clone().requires_grad_()
    loss, count = sampled_loss(Head(), {"x": logits}, seed=0)
    (gradients,) = torch.autograd.grad(loss, logits)
    found = (gradients[0].T @ gradients[0]) / count
    alone, one = logits[0, 0].sigmoid().detach(), logits[0, 0].softmax(-1).detach()
    wanted = {"multi_label_classification": (alone * (1 - alone)).diag(), "regression": torch.eye(3)}
    torch.testing.assert_close(found, wanted.get(kind, one.diag() - one.outer(one)), rtol=0, atol=0.03)


def test_predicted_loss_is_the_divergence_of_a_small_change():
    dense = tiny_llama()
    batches = batches_for(dense, count=8)
    statistics = collect_statistics(dense, CONFIG, calibration=batches)
    ratios = []
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        model = tiny_llama()
        weight = model.get_submodule(name).weight
        change = 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight.data += change
        expected = predicted_loss(change, statistics.grams[name], statistics.output_grams[name], statistics.pairs(name))
        ratios.append(divergence(dense, model, batches) / expected)
    # inputs and gradients are not quite independent, nor are tokens, and labels are drawn once
    assert all(0.6 < ratio < 1.6 for ratio in ratios), ratios


def test_fisher_matrices_without_classes_are_those_of_the_squared_error_of_features():
    body = tiny_llama().model
    name = "layers.1.mlp.down_proj"
    batches = [
        {"input_ids": torch.randint(0, 256, (32, 24), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    ]
    found = fisher_statistics(body, [name], batches).output_grams[name][0]
    # J^T J by the chain rule: the layer writes to the stream, which the last norm alone reads
    entered = []
    handle = body.norm.register_forward_pre_hook(lambda module, args: entered.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            body(**batch)
    handle.remove()
    jacobians = torch.func.vmap(torch.func.jacrev(body.norm))(torch.cat(entered))
    right = (jacobians.mT @ jacobians).sum(0)
    # of 1536 directions drawn
    assert (found - right).norm() < 0.3 * right.norm()
    assert found.trace() == pytest.approx(right.trace().item(), rel=0.03)


def test_regrouped_blocks_are_those_of_the_matrix():
    gram = positive(12)
    for blocks in (1, 2, 3, 4, 6, 12):
        cut = torch.stack([gram[i : i + 12 // blocks, i : i + 12 // blocks] for i in range(0, 12, 12 // blocks)])
        torch.testing.assert_close(regroup(gram[None], blocks), cut)
        if 4 % blocks == 0:
            quarters = torch.block_diag(*regroup(gram[None], 4))
            torch.testing.assert_close(regroup(regroup(gram[None], 4), blocks), regroup(quarters[None], blocks))
    thirds = regroup(regroup(gram[None], 3), 2)
    torch.testing.assert_close(thirds, torch.stack([gram.diagonal()[:6].diag(), gram.diagonal()[6:].diag()]))


def test_metric_blocks_bound_the_memory():
    assert [metric_blocks(n) for n in (576, 2048, 4096, 11008)] == [1, 1, 2, 8]


SPECS = [LowRank(32, 24, 6), Monarch(32, 24, 2, (2, 4)), Blast(32, 24, 6, (2, 4))]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.structure)
def test_output_weighting_lowers_the_error_it_weighs(spec):
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    gram, output_gram = positive(32, 2).float(), (positive(24, 3) * torch.logspace(0, 1, 24)).float()
    output_gram = (output_gram + output_gram.T) / 2 + 30 * torch.eye(24)
    blocks = regroup(output_gram[None], spec.num_blocks[1])
    metric = torch.block_diag(*blocks)
    errors = {}
    for given in (None, output_gram[None]):
        fitted = factorize(weight, spec, gram, given, options=FitOptions(rounds=30, tolerance=0.0, damping=0.0))
        change = weight - implementation_of(spec.structure).dense(**fitted.tensors)
        errors[given is not None] = ((metric @ change) * (change @ gram)).sum().item()
    assert errors[True] < 0.97 * errors[False]


def test_low_rank_is_optimal_in_the_metric_of_both_sides():
    weight, gram, output_gram = torch.randn(24, 32), positive(32, 2), positive(24, 3)
    fitted = factorize(
        weight, LowRank(32, 24, 6), gram.float(), output_gram[None].float(), options=FitOptions(damping=0.0)
    )
    damped = output_gram + OUTPUT_DAMPING * output_gram.diagonal().mean() * torch.eye(24)
    left, right = torch.linalg.cholesky(damped), torch.linalg.cholesky(gram)
    change = weight - fitted.tensors["u"] @ fitted.tensors["v"]
    tail = torch.linalg.svdvals(left.T @ weight.double() @ right)[6:]
    error = (left.T @ change.double() @ right).norm()
    torch.testing.assert_close(error, tail.norm(), rtol=1e-3, atol=0.0)


def test_a_metric_undoes_itself_and_bears_outputs_that_nothing_feels():
    weight = torch.randn(12, 5)
    metric = OutputMetric(positive(12).float()[None], 3)
    torch.testing.assert_close(metric.restore(metric.whiten(weight)), weight, rtol=1e-4, atol=1e-5)
    unfelt = OutputMetric(torch.zeros(1, 12, 12), 3)
    torch.testing.assert_close(unfelt.whiten(weight), weight)
    with pytest.raises(ValueError, match="gradients hold NaN"):
        OutputMetric(torch.full((1, 12, 12), float("nan")), 3)


def test_the_curve_is_the_loss_of_the_best_low_rank_matrix():
    weight = torch.randn(24, 32)
    gram, output_gram = positive(32, 2).float(), positive(24, 3).float()[None]
    curve = loss_curve(weight, gram, output_gram, pairs=100, damping=0.0)
    assert len(curve) == 25 and curve[-1] == 0 and (curve.diff() <= 0).all()
    fitted = factorize(weight, LowRank(32, 24, 7), gram, output_gram, options=FitOptions(damping=0.0))
    change = (weight - fitted.tensors["u"] @ fitted.tensors["v"]).double()
    damped = output_gram[0] + OUTPUT_DAMPING * output_gram[0].diagonal().mean() * torch.eye(24)
    loss = ((damped.double() @ change) * (change @ gram.double())).sum() / 2 / 10**2
    torch.testing.assert_close(curve[7], loss, rtol=1e-3, atol=0.0)


def random_options(seed, layers=5, count=6):
    generator = torch.Generator().manual_seed(seed)
    options = {}
    for i in range(layers):
        costs = torch.randint(1, 9, (count,), generator=generator).cumsum(0).tolist()
        falls = torch.rand(count, generator=generator).sort().values.cumsum(0).flip(0).tolist()
        options[f"layer{i}"] = [Option(None, cost, loss) for cost, loss in zip(costs, falls, strict=True)]
    return options


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_near_the_best_of_all_choices(seed):
    options = random_options(seed)
    least, most = (sum(pick(o.cost for o in layer) for layer in options.values()) for pick in (min, max))
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = least + share * (most - least)
        taken = allocate(options, budget)
        assert sum(option.cost for option in taken.values()) <= budget
        best = min(
            sum(option.loss for option in choice)
            for choice in itertools.product(*options.values())
            if sum(option.cost for option in choice) <= budget
        )
        worst = sum(layer[0].loss for layer in options.values())
        assert sum(option.loss for option in taken.values()) <= best + 0.05 * (worst - best) + 1e-12
    with pytest.raises(ValueError, match="the smallest options cost"):
        allocate(options, least - 0.5)


@pytest.mark.parametrize("structure, blocks", [("low_rank", None), ("monarch", (4, 4)), ("blast", (4, 16))])
def test_candidates_span_the_ratios_in_ranks_that_kernels_like(structure, blocks):
    specs = at_ranks(make_spec(structure, 4096, 4096, rank=1, num_blocks=blocks), 0.1, 1.0)
    assert specs[0].ratio < 0.13 and 0.95 < specs[-1].ratio < 1
    step = {spec.rank % 16 for spec in specs}
    assert step == {0} or structure == "monarch"


@pytest.mark.parametrize(
    "structure, blocks, step",
    [("low_rank", None, 128), ("pivoted", None, 128), ("monarch", (4, 4), 32), ("blast", 16, 128)],
)
def test_ranks_of_whole_lines(structure, blocks, step):
    shape = make_spec(structure, 4096, 4096, rank=1, num_blocks=blocks)
    assert {spec.rank % step for spec in at_ranks(shape, 0.1, 1.0, 128)} == {0}
    assert {spec.rank % step for spec in at_ranks(shape, 0.1, 1.0)} != {0} or structure == "monarch"
    # a layer that would have few ranks left takes others
    assert at_ranks(make_spec("low_rank", 256, 256, rank=1), 0.1, 1.0, 128) == at_ranks(
        make_spec("low_rank", 256, 256, rank=1), 0.1, 1.0
    )


def test_a_shared_budget_takes_ranks_of_whole_lines():
    model = tiny_llama()
    config = BLRConfig("low_rank", ratio=0.5, rank_multiple=2, fit_rounds=2)
    compress(model, config, calibration=batches_for(model), progress=False)
    assert {module.spec.rank % 2 for module in blr_modules(model).values()} == {0}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_vit])
@pytest.mark.parametrize(
    "structure, blocks", [("low_rank", None), ("pivoted", None), ("monarch", 2), ("blast", (2, 4))]
)
def test_sharing_the_budget_and_weighing_outputs_pay(build, structure, blocks):
    dense = build()
    batches = batches_for(dense, count=6)
    results = {}
    for on in (False, True):
        model = build()
        config = BLRConfig(structure, ratio=0.5, num_blocks=blocks, fisher=on, sequential=False, fit_rounds=4)
        report = compress(model, config, calibration=batches, progress=False)
        assert report.ratio <= 0.5
        results[on] = divergence(dense, model, batches)
    assert results[True] < 0.9 * results[False]


def test_auto_is_predicted_to_be_no_worse_than_any_one_structure():
    dense = tiny_llama()
    batches = batches_for(dense, count=6)
    results, losses = {}, {}
    for structure in ("auto", "low_rank", "pivoted", "monarch", "blast"):
        model = tiny_llama()
        config = BLRConfig(structure, ratio=0.4, fit_rounds=4)
        report = compress(model, config, calibration=batches, progress=False)
        assert report.ratio <= 0.4
        results[structure], losses[structure] = divergence(dense, model, batches), report.predicted_loss
        if structure == "auto":
            assert len({layer.spec.structure for layer in report.layers}) > 1
    assert losses["auto"] <= min(losses.values())
    assert results["auto"] <= 1.05 * min(results.values())


def test_what_a_structure_gains_is_read_off_between_its_trials():
    trials = [(0.2, 1.0), (0.6, 0.25)]
    assert [factor_at(trials, ratio) for ratio in (0.1, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([1, 1, 0.5, 0.25, 0.25])
    assert factor_at([(0.3, 0.7)], 0.5) == pytest.approx(0.7) and factor_at([], 0.5) == 1.0


def test_trials_say_what_whole_fits_give():
    model = tiny_llama()
    statistics = collect_statistics(model, CONFIG, calibration=batches_for(model, count=6))
    config = BLRConfig("auto", ratio=0.5, fit_rounds=12)
    name = "model.layers.1.mlp.up_proj"
    layer = Layer(model, name, statistics, config)
    shapes = [Blast(64, 96, 1, (4, 4)), LowRank(64, 96, 1)]
    factors = trial_factors({name: layer}, {name: shapes}, 0.5)
    assert factors[layer.kind, "low_rank", (1, 1)] == []
    trials = factors[layer.kind, "blast", (4, 4)]
    assert [ratio for ratio, _ in trials] == pytest.approx([0.3, 0.75], abs=0.03)
    for ratio, factor in trials:
        spec = make_spec("blast", 64, 96, ratio=ratio, num_blocks=(4, 4))
        weight, gram, output_gram = layer.matrices()
        fitted = factorize(weight, spec, gram, output_gram, FitOptions(rounds=12, damping=layer.options.damping))
        change = implementation_of("blast").dense(**fitted.tensors) - weight
        gram = damped(gram, layer.options.damping)
        expected = predicted_loss(change, gram, output_gram, statistics.pairs(layer.name))
        low_rank = interpolate(layer.curve(), spec.equivalent_rank)
        assert factor == pytest.approx(expected / low_rank, rel=1e-3)


def test_a_budget_can_count_anything():
    model = tiny_llama()
    batches = batches_for(model)
    statistics = collect_statistics(model, CONFIG, calibration=batches)
    plan = resolve_plan(model, CONFIG)

    # a unit of cost that only MLP layers pay
    def cost(name, spec, dense):
        size = spec.dense_parameters if dense else spec.num_parameters
        return size if 96 in (spec.in_features, spec.out_features) else 0

    budget = Budget(amount=0.3 * 6 * 64 * 96, cost=cost, floor=0.2, ceiling=0.6)
    chosen, loss = share_budget(model, plan, statistics, CONFIG, budget)
    assert loss > 0
    assert {name.split(".")[3] for name in chosen} == {"mlp"}
    assert sum(cost(name, layer.spec, False) for name, layer in chosen.items()) <= budget.amount
    assert all(0.15 < layer.spec.ratio <= 0.6 for layer in chosen.values())


@pytest.mark.parametrize("sequential", [False, True])
def test_layers_left_dense_and_overrides_are_kept_through_a_checkpoint(sequential, tmp_path):
    model = tiny_llama()
    config = BLRConfig("low_rank", ratio=0.9, overrides={"q_proj": {"ratio": 0.3}}, sequential=sequential)
    report = compress(model, config, calibration=batches_for(model), progress=False)
    assert report.left_dense and report.ratio <= 0.9
    assert str(len(report.left_dense)) + " left dense" in str(report)
    ranks = {layer.name: layer.spec.rank for layer in report.layers}
    assert ranks["model.layers.0.self_attn.q_proj"] == make_spec("low_rank", 64, 64, ratio=0.3).rank
    for name in report.left_dense:
        kept, before = model.get_submodule(name), tiny_llama().get_submodule(name)
        assert type(kept) is torch.nn.Linear
        # sequential fits move them, to make up for the layers before, which the first ones do not have
        moves = sequential and not re.fullmatch(r"model.layers.0.self_attn.[qkv]_proj", name)
        assert torch.equal(kept.weight, before.weight) is not moves, name
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    batch = batches_for(model)[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"allocation": "even"}, r"allocation must be one of \('loss', 'uniform'\) or None, got 'even'"),
        ({"allocation": "loss", "fisher": False}, "set ratio, and fisher=True"),
        ({"allocation": "loss", "ratio": None, "rank": 4}, "set ratio, and fisher=True"),
        ({"structure": "auto", "ratio": None, "rank": 4}, 'structure="auto" shares out a ratio'),
        ({"structure": "auto", "num_blocks": 4}, 'structure="auto" shares out a ratio'),
        ({"sequential": 1}, "sequential must be True or False"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BLRConfig(**{"structure": "low_rank", "ratio": 0.5, **settings})


def test_configs_that_share_statistics_share_curves(monkeypatch):
    model = tiny_llama()
    batches = batches_for(model)
    statistics = collect_statistics(model, CONFIG, calibration=batches)
    asked = []
    monkeypatch.setattr(layer_trials, "loss_curve", lambda *given: asked.append(1) or loss_curve(*given))
    plans = [resolve_plan(model, CONFIG) for _ in range(2)]
    first, second = (share_budget(copy.deepcopy(model), plan, statistics, CONFIG) for plan in plans)
    assert first == second and len(asked) == len(plans[0])
    # of another weight the curve is another, whatever the statistics say
    other = copy.deepcopy(model)
    name = next(iter(plans[0]))
    other.get_submodule(name).weight.data.mul_(2)
    curves = [Layer(each, name, statistics, CONFIG).curve() for each in (model, other)]
    torch.testing.assert_close(torch.tensor(curves[1]), 4 * torch.tensor(curves[0]))
