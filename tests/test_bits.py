"""Bits shared out over the layers: what the plan stores, what it is predicted to lose, and what it says of why."""

import itertools
import math

import pytest
import torch
from bits_cases import all_options, config, dense, layer_options, shared, statistics
from tiny import batches_for, build, divergence, tiny_llama
from transformers import OPTConfig, OPTForCausalLM

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.compression.allocation import Option, allocate_both, choice_of, loss_of, within
from hf_blr.compression.bits import TimeLimit, formats_of, share_bits, uniform
from hf_blr.compression.layer_trials import Layer
from hf_blr.compression.rounding_loss import AfterFeedback, storable
from hf_blr.factorize import factorize
from hf_blr.factorize.bits import coupling_of
from hf_blr.factorize.row_blocks import DAMPING, ROW_BLOCKS
from hf_blr.formats import PLAIN, format_named
from hf_blr.integration import blr_modules
from hf_blr.plan import resolve_plan
from hf_blr.structures import Dense, LowRank


def stored_bits(plan, model):
    dtype = torch.bfloat16
    kept = sum(8 * layer.storage.num_bytes(layer.spec, dtype) for layer in plan.values())
    left = [name for name in resolve_plan(model, config(4)) if name not in plan]
    numbers = [model.get_submodule(name).weight.numel() for name in resolve_plan(model, config(4))]
    return (kept + 16 * sum(model.get_submodule(name).weight.numel() for name in left)) / sum(numbers)


@pytest.mark.parametrize("bits", [2.5, 4.3, 9.0, 16.0])
def test_plans_stay_within_the_bits_and_use_them(bits):
    plan, _, _ = shared(bits)
    assert 0.85 * bits < stored_bits(plan, dense()) <= bits


def test_more_bits_are_predicted_to_lose_less():
    losses = [shared(bits)[1] for bits in (2.5, 4.3, 9.0, 16.0)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4
    # what stays as it is loses nothing
    assert losses[-1] == 0 and not shared(16.0)[0]


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.3, 5.0, 8.3])
def test_no_uniform_plan_of_whole_layers_is_better(bits):
    _, options = all_options()
    numbers = sum(dense().get_submodule(name).weight.numel() for name in options)
    plans = uniform(options, bits * numbers)
    names = {plan[next(iter(plan))].storage.name for plan in plans}
    # a row of 64 or 96 numbers carries a scale of 16 bits
    widths = {"int2": 2.25, "int3": 3.25, "int4": 4.25, "int8": 8.25, "fp8": 8.25}
    assert {name for name, width in widths.items() if width <= bits - 0.01} <= names
    loss = shared(bits)[1]
    assert all(loss <= sum(option.loss for option in plan.values()) for plan in plans)


def test_options_are_all_that_a_layer_can_become():
    _, options = all_options()
    kinds = {option.kind for option in options["model.layers.0.mlp.down_proj"]}
    assert {("dense", "plain"), ("dense", "int3"), ("low_rank", "int4"), ("pivoted", "fp8")} <= kinds
    assert {("monarch", "4x4", "int2"), ("blast", "4x16", "int8"), ("low_rank", "plain")} <= kinds


def test_factors_are_tried_at_ranks_that_groups_divide():
    """fp8 takes any rank: trials at such a one alone would leave factors in integers out."""
    _, options = layer_options(config(4, group_size=16))
    for of_layer in options.values():
        kinds = {option.kind for option in of_layer}
        assert {("low_rank", name) for name in ("int8", "int4", "int3", "int2", "fp8")} <= kinds


@pytest.mark.parametrize("storage", ["int4", "int3", "int2", "fp8"])
def test_predicted_losses_of_rounding_are_near_those_of_rounded_layers(storage):
    """Also for layers on which no trial was made, and for ranks between those that were tried."""
    layers, options = all_options()
    for name, layer in layers.items():
        weight, gram, output_gram = layer.matrices()
        n, k = weight.shape
        for spec in (Dense(k, n, min(k, n)), LowRank(k, n, 20)):
            option = next(o for o in options[name] if o.spec == spec and o.storage.name == storage)
            fitted = factorize(weight, spec, gram, output_gram, layer.options, format_named(storage))
            measured = layer.loss(fitted.matrix(spec))
            assert 0.6 < option.loss / measured < 1.6, (name, spec)


def test_errors_count_for_what_the_feedback_leaves_of_their_column_and_row():
    layer = Layer(dense(), "model.layers.0.mlp.down_proj", statistics(), config(4))
    weight, gram, output_gram = layer.matrices()
    damping = layer.options.damping
    h = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))
    # the least that an error of one in column i costs, if all columns behind it may move: 1 / (H_ii..)^-1 of its first
    left = torch.stack([1 / torch.linalg.inv(h[i:, i:])[0, 0] for i in range(len(h))])
    metric = torch.block_diag(*output_gram).double()
    coupling = coupling_of(output_gram, 1, damping, len(gram))[0]
    coupling += DAMPING * coupling.diagonal().mean() * torch.eye(len(coupling))
    felt = torch.zeros(len(metric), dtype=torch.float64)
    for row in range(len(metric)):
        # this row's error, and where the blocks of rows behind go for it, one after the other
        moved = torch.zeros_like(felt)
        moved[row] = 1
        behind = torch.arange(len(metric)) % ROW_BLOCKS > row % ROW_BLOCKS
        moved[behind] = -torch.linalg.solve(coupling[behind][:, behind], coupling[behind][:, row])
        felt[row] = moved @ metric @ moved
    errors = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    expected = (felt[:, None] * errors**2 * left).sum() / (2 * statistics().pairs(layer.name))
    assert AfterFeedback.of(layer, torch.device("cpu")).loss(errors) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("storage", ["int8", "int4", "int3", "int2", "fp8"])
def test_the_loss_of_a_whole_matrix_is_known_before_it_is_rounded(storage):
    for name in resolve_plan(dense(), config(4)):
        layer = Layer(dense(), name, statistics(), config(4))
        weight, gram, output_gram = layer.matrices()
        # layers with rows and columns that weigh unlike each other, as no trial of another layer could know
        spec, kept = Dense(*weight.T.shape, min(weight.shape)), format_named(storage, None if storage == "fp8" else 16)
        rounded = factorize(weight, spec, gram, output_gram, layer.options, kept)
        predicted = AfterFeedback.of(layer, torch.device("cpu")).of_whole(weight, kept)
        assert predicted / layer.loss(rounded.matrix(spec)) == pytest.approx(1, abs=0.15)


def test_reasons_name_the_best_of_what_costs_no_more():
    whole = Dense(8, 8, 8)
    taken = Option(LowRank(8, 8, 2), 100.0, 0.1, format_named("int4"))
    options = [
        taken,
        Option(LowRank(8, 8, 1), 50.0, 0.2, format_named("int4")),
        Option(LowRank(8, 8, 1), 90.0, 0.15, format_named("int8")),
        Option(whole, 95.0, 0.3, format_named("int2")),
        Option(None, 128.0, 0.0),
    ]
    choice = choice_of(taken, options, 64)
    assert (choice.taken, choice.loss, choice.bits) == ("low_rank int4", 0.1, 100 / 64)
    assert (choice.runner_up, choice.runner_up_loss) == ("low_rank int8", 0.15)
    assert choice_of(options[1], options, 64).runner_up is None


def test_compressions_follow_the_plan_and_report_why():
    model, batches = tiny_llama(), batches_for(tiny_llama(), count=4)
    report = compress(model, config(3.5), calibration=batches, progress=False)
    modules = blr_modules(model)
    assert set(modules) == {layer.name for layer in report.layers}
    for layer in report.layers:
        module, choice = modules[layer.name], layer.choice
        assert choice.taken.split()[0] == module.spec.structure and choice.taken.split()[-1] == module.storage.name
        stored = 8 * module.storage.num_bytes(module.spec, torch.float32)
        assert choice.bits == pytest.approx(stored / module.spec.dense_parameters)
        assert choice.loss >= 0 and (choice.runner_up is None) == (choice.runner_up_loss is None)
    assert report.predicted_loss == pytest.approx(sum(layer.choice.loss for layer in report.layers))
    assert report.to_dict()["layers"][0]["choice"]["taken"] == report.layers[0].choice.taken
    assert divergence(tiny_llama(), model, batches) < 0.5


def test_overrides_keep_what_they_say_and_their_bits_count():
    wanted = config(4, overrides={"q_proj": {"structure": "low_rank", "rank": 8, "factor_format": "int8"}})
    plan, _, reasons = share_bits(dense(), resolve_plan(dense(), wanted), statistics(), wanted)
    assert all(plan[name].spec == LowRank(64, 64, 8) for name in plan if "q_proj" in name)
    assert all("down_proj" in name for name in reasons)
    assert 3.2 < stored_bits(plan, dense()) <= 4


def test_groups_are_those_of_the_config():
    plan, _, _ = shared(4.3, group_size=16)
    sizes = {storage.name: storage.group_size for storage in formats_of(config(4.3, group_size=16))}
    # eight bits need no groups, which would leave few ranks to choose from
    assert sizes == {"int8": None, "int4": 16, "int3": 16, "int2": 16, "fp8": None}
    for layer in plan.values():
        assert layer.storage == PLAIN or layer.storage in storable(layer.spec, formats_of(config(4.3, group_size=16)))


def test_layers_that_nothing_reaches_keep_their_matrix():
    import dataclasses

    name = "model.layers.0.self_attn.q_proj"
    deaf = {**statistics().output_grams, name: torch.zeros_like(statistics().output_grams[name])}
    wanted = config(4.4)
    found = dataclasses.replace(statistics(), output_grams=deaf)
    plan, _, reasons = share_bits(dense(), resolve_plan(dense(), wanted), found, wanted)
    assert plan[name].spec == Dense(64, 64, 64) and plan[name].storage.name == "int4" and name not in reasons
    assert stored_bits(plan, dense()) <= 4.4


def test_fewer_bits_than_the_smallest_options_take_are_refused():
    with pytest.raises(ValueError, match=r"less than the smallest options take together: give at least (\d\.\d+)") as e:
        shared(0.05)
    least = float(str(e.value).split("at least ")[1].split(",")[0])
    assert stored_bits(shared(least + 1e-3)[0], dense()) <= least + 1e-3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"structure": "blast"}, 'set structure="auto"'),
        ({"ratio": 0.5}, "is a budget of its own, got ratio=0.5"),
        ({"rank": 4}, "is a budget of its own, got ratio=None, rank=4"),
        ({"num_blocks": 4}, "num_blocks=\\(4, 4\\)"),
        ({"factor_format": "int4"}, "chooses formats, got factor_format='int4'"),
        ({"dense_format": "int4"}, "chooses formats"),
        ({"fisher": False}, "leave fisher and allocation"),
        ({"allocation": "uniform"}, "leave fisher and allocation"),
        ({"bits_per_weight": 0}, "a positive number of bits"),
        ({"bits_per_weight": "4"}, "a positive number of bits"),
    ],
)
def test_settings_that_contradict_a_budget_of_bits_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BLRConfig(**{"structure": "auto", "bits_per_weight": 4, **settings})


def test_without_text_bits_are_refused():
    with pytest.raises(ValueError, match="compares structures on text, and there is none"):
        compress(tiny_llama(), config(4), progress=False)


def test_layers_that_differ_by_a_digit_or_in_size_are_kinds_of_their_own():
    sizes = {"hidden_size": 48, "ffn_dim": 80, "word_embed_proj_dim": 48, "num_hidden_layers": 2, "vocab_size": 260}
    model = build(OPTForCausalLM, OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, init_std=0.1))
    batches = [{"input_ids": torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(0))}]
    config = BLRConfig("auto", bits_per_weight=4.0)
    found = collect_statistics(model, config, calibration=batches)
    kinds = [
        Layer(model, f"model.decoder.layers.{i}.{fc}", found, config).kind for i in (0, 1) for fc in ("fc1", "fc2")
    ]
    assert kinds[:2] == kinds[2:] and len(set(kinds)) == 2 and "fc1" in kinds[0] and "80 x 48" in kinds[1]
    report = compress(model, config, calibration=batches, statistics=found, progress=False)
    # all six kinds of layers have options of their own
    assert {layer.name.rpartition(".")[2] for layer in report.layers} >= {"fc1", "fc2", "q_proj"}


def option(rank, cost, loss, seconds):
    return Option(LowRank(8, 8, rank), cost, loss, seconds=seconds)


def test_two_budgets_are_kept_by_nearly_the_best_plan_within_both():
    generator = torch.Generator().manual_seed(0)
    options = {}
    for name in "abcdef":
        sizes = (10 * torch.rand(5, 2, generator=generator) + 0.1).tolist()
        # what costs more loses less
        options[name] = [option(i + 1, cost, 20 / (cost + time), time) for i, (cost, time) in enumerate(sizes)]
    plans = [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]
    for cost, seconds in ((24, 36), (36, 24), (30, 30), (42, 20)):
        best = min(loss_of(plan) for plan in plans if within(plan, cost, seconds))
        found = allocate_both(options, cost, seconds)
        assert within(found, cost, seconds) and loss_of(found) <= 1.25 * best
        # what the first budget alone allows is beyond the second
        assert min(loss_of(plan) for plan in plans if within(plan, cost, math.inf)) < best
    assert allocate_both(options, 36, 1e-3) is None


def test_plans_within_bits_and_time():
    wanted = config(4.3)
    plan = resolve_plan(dense(), wanted)

    def shared_within(seconds):
        limit = TimeLimit(seconds, lambda name, spec, storage, whole: spec.flops(1) / 1e6)
        return share_bits(dense(), plan, statistics(), wanted, limit)

    least = sum(layer.spec.dense_parameters for layer in plan.values()) * 2 / 1e6
    free, tight = shared_within(2 * least), shared_within(0.5 * least)
    assert free[1] == pytest.approx(shared(4.3)[1], rel=0.05)
    assert tight[1] > free[1] and stored_bits(tight[0], dense()) <= 4.3
    assert sum(layer.spec.flops(1) for layer in tight[0].values()) / 1e6 <= 0.5 * least
    with pytest.raises(ValueError, match="no plan was found within bits_per_weight and .* ms"):
        shared_within(1e-6)
