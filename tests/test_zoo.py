"""Statistics of every architecture are those of plain forwards over its samples, one at a time and without padding."""

import copy

import pytest
import torch
from zoo_inputs import padded_batches, plain_grams, samples
from zoo_models import KINDS, LEFT_OUT, OF_POSITIONS, build, linear_targets, reads_positions

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration.blockwise import iterate_grams, whole_model_grams
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.dense import dense_weight
from hf_blr.modes import evaluating

#: layers that run on other inputs than these
UNREACHED = {"mamba": "dt_proj", "longformer": "_global"}
#: what a mask hides is seen all the same: the pooled token is the last one
SEES_PADDING = {"siglip"}

BATCHES = {"one by one": (1,) * 6, "ragged": (3, 2, 1), "at once": (6,)}

each = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def zoo(name):
    """(the model, its targets, its samples)."""
    if name in LEFT_OUT:
        pytest.skip(LEFT_OUT[name])
    model = build(name)
    return model, [target for target in linear_targets(model) if not reads_positions(name, target)], samples(name)


def check(found, right, message):
    assert set(found) == set(right), message
    for name, gram in right.items():
        wrong = (found[name].double() - gram).norm() / gram.norm()
        assert wrong < 1e-5, f"{message}: {name} is wrong by {wrong:.1e}"


@each
def test_grams_are_those_of_plain_forwards(name, zoo):
    model, names, parts = zoo
    right = plain_grams(model, names, parts)
    assert set(right) == {each for each in names if not each.endswith(UNREACHED.get(name, "nothing"))}
    for how, sizes in BATCHES.items():
        batches = padded_batches(name, parts, sizes)
        with evaluating(model):
            check(whole_model_grams(model, names, batches), right, f"whole passes, {how}")
        groups = list(iterate_grams(model, names, batches))
        assert len(groups) > 1
        check({layer: gram for group in groups for layer, gram in group.items()}, right, f"by blocks, {how}")


@each
def test_sequential_problems_of_the_dense_model_are_its_own(name, zoo):
    model, names, parts = zoo
    right, found = plain_grams(model, names, parts), {}
    with evaluating(model):
        chain = SequentialChain.trace(model, names, padded_batches(name, parts, (3, 2, 1)))
        assert not chain.apart
        for group in chain.problems(damping=1e-3):
            for layer, problem in group.items():
                found[layer] = problem.gram
                weight = dense_weight(model.get_submodule(layer))
                torch.testing.assert_close(problem.target, weight, rtol=1e-2, atol=1e-3)
    check(found, right, "sequential")


@each
def test_fisher_matrices_are_the_same_padded_or_not_and_for_any_batches(name, zoo):
    model, names, parts = zoo
    right = plain_grams(model, names, parts)
    config = BLRConfig("low_rank", ratio=0.5, target_modules=names)
    plain = collect_statistics(model, config, calibration=parts)
    assert any(gram.any() for gram in plain.output_grams.values())
    for how, sizes in BATCHES.items():
        batches = padded_batches(name, parts, sizes)
        found = collect_statistics(model, config, calibration=batches)
        check(found.grams, right, f"with gradients, {how}")
        if name not in SEES_PADDING:
            largest = max(gram.norm() for gram in plain.output_grams.values())
            for layer, gram in plain.output_grams.items():
                wrong = (found.output_grams[layer] - gram).norm() / (gram.norm() + 1e-6 * largest)
                assert wrong < 1e-3, f"{how}: G of {layer} is wrong by {wrong:.1e}"


#: models of every form: two sides, stages, towers, lists between lists, shared keys, experts
FORMS = ["llama", "qwen2_moe", "gemma4", "modernbert", "t5", "bart", "whisper", "wav2vec2", "swin", "clip", "llava"]


@pytest.mark.parametrize("name", [*FORMS, "qwen2_vl", "qwen3_vl"])
def test_sequential_problems_are_those_of_the_model_as_it_is_then(name, zoo):
    model, names, parts = zoo
    generator = torch.Generator().manual_seed(0)
    seen = []
    with evaluating(model):
        chain = SequentialChain.trace(model, names, padded_batches(name, parts, (3, 2, 1)))
        for group in chain.problems(damping=1e-3):
            check(
                {layer: problem.gram for layer, problem in group.items()}, plain_grams(model, list(group), parts), name
            )
            seen += group
            for layer in group:
                # as a coarse fit would leave them
                weight = model.get_submodule(layer).weight
                weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("name", ["llama", "gemma4", "deberta_v2", "t5", "wav2vec2", "swin", "qwen3_vl"])
def test_a_fit_is_the_same_padded_or_not_and_for_any_batches(name, zoo):
    dense, _, _ = zoo
    # more rows than a layer has inputs: regressions on fewer magnify the last digits
    parts, outputs = samples(name, 40, 1 if name == "qwen3_vl" else 3), []
    tables = list(OF_POSITIONS.get(name, ())) or None
    config = BLRConfig("low_rank", ratio=0.5, modules_to_not_convert=tables)
    for sizes in ((1,) * 40, (16, 12, 12), (40,)):
        model = copy.deepcopy(dense)
        compress(model, config, calibration=padded_batches(name, parts, sizes), progress=False)
        with torch.no_grad():
            outputs.append(torch.cat([model(**part).logits.flatten() for part in parts[:6]]))
    for other in outputs[1:]:
        assert (other - outputs[0]).norm() < 1e-3 * outputs[0].norm()
