"""Refinement on the calibration text, of compressed models and of dense ones."""

import copy

import pytest
import torch
from tiny import tiny_bert, tiny_llama

from hf_blr import BLRConfig, compress
from hf_blr.finetune import refine
from hf_blr.finetune.divergence import feature_loss
from hf_blr.finetune.loop import train
from hf_blr.ops import blast_linear, low_rank_linear, monarch_linear
from hf_blr.targets import find_targets

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def test_refinement_lowers_the_loss_and_trains_factors_only():
    dense = tiny_llama()
    model = tiny_llama()
    config = BLRConfig("blast", ratio=0.5, num_blocks=2, allocation="uniform")
    compress(model, config, calibration=list(WINDOWS.split(4)), progress=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    history = refine(model, dense, WINDOWS, epochs=10, batch_size=4, learning_rate=3e-3)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith((".u", ".s", ".v")), name


def divergence(model, dense, windows):
    with torch.no_grad():
        p, q = (m(windows).logits.double().log_softmax(-1) for m in (dense, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("rate, gains", [(3e-3, True), (10.0, False)])
def test_refinement_keeps_what_was_best_on_held_out_text(rate, gains):
    dense, model = tiny_llama(), tiny_llama()
    config = BLRConfig("pivoted", ratio=0.5, allocation="uniform")
    compress(model, config, calibration=list(WINDOWS.split(4)), progress=False)
    other = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    before = divergence(model, dense, other)
    windows = torch.randint(0, 256, (80, 32), generator=torch.Generator().manual_seed(2))
    how = {"epochs": 1, "batch_size": 2, "distill_weight": 1.0}
    history = refine(model, dense, windows, learning_rate=rate, held_out=other, **how)
    measured = [entry["held_out_divergence"] for entry in history if "held_out_divergence" in entry]
    after = divergence(model, dense, other)
    assert after == pytest.approx(min(measured), rel=0.02) and measured[0] == pytest.approx(before, rel=0.02)
    if gains:
        assert after < 0.97 * before and len(measured) == 11
    else:
        # a rate that ruins the model: three measurements in a row were worse, and what was there came back
        assert after == pytest.approx(before, rel=1e-3) and len(measured) == 4


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_refinement_trains_the_targets_that_were_left_dense(rate):
    model, left, never = tiny_llama(), "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
    config = BLRConfig("low_rank", ratio=0.5, allocation="uniform", modules_to_not_convert=[never])
    compress(model, config, calibration=list(WINDOWS.split(4)), progress=False)
    model.set_submodule(left, model.get_submodule(left).to_dense())
    before = {name: p.clone() for name, p in model.named_parameters()}
    refine(model, tiny_llama(), WINDOWS, epochs=1, batch_size=4, dense_rate=rate)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert (f"{left}.weight" in moved) == (rate > 0)
    assert all(name.endswith((".u", ".v")) for name in moved - {f"{left}.weight"})


def test_refinement_of_a_dense_model_trains_the_targets_alone_and_with_the_same_loss():
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    history = refine(model, dense, WINDOWS, epochs=10, batch_size=4, learning_rate=3e-3, dense_rate=1.0)
    logged = [entry for entry in history if "loss" in entry]
    # the share of the text's own loss moves it: of the divergence from itself nothing would
    assert logged[0]["distill_loss"] < 1e-3 < logged[-1]["distill_loss"]
    assert logged[-1]["lm_loss"] < logged[0]["lm_loss"]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(name))}
    assert moved == {f"{name}.weight" for name in find_targets(dense)}
    with pytest.raises(ValueError, match="compress it first"):
        refine(copy.deepcopy(dense), dense, WINDOWS, epochs=1, batch_size=4)
    with pytest.raises(TypeError, match="got a str: hf_blr.text.load_windows makes windows of text"):
        refine(model, dense, ["a text"], epochs=1)


@pytest.mark.parametrize("structure", ["low_rank", "monarch", "blast"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_by_the_dense_matrix_have_the_references_values_and_gradients(structure, bias):
    linear = {"low_rank": low_rank_linear, "monarch": monarch_linear, "blast": blast_linear}[structure]
    shapes = {
        "low_rank": [(6, 3), (3, 8)],
        "monarch": [(2, 3, 4), (2, 4, 4)],
        "blast": [(2, 3, 3), (2, 2, 3), (2, 3, 4)],
    }[structure]
    generator = torch.Generator().manual_seed(0)
    results = []
    for impl in ("reference", "dense"):
        generator.manual_seed(0)
        given = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(2, 5, 8), *shapes, (6,)]]
        given = [t.requires_grad_() for t in given]
        out = linear(*given[:-1], given[-1] if bias else None, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), given if bias else given[:-1])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def encoder_batches(count, seed):
    """Padded batches of different lengths, as an encoder reads them."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(count):
        ids = torch.randint(0, 256, (4, 8 + 2 * (i % 4)), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def features_apart(model, dense, batches):
    """The squared error of the features at all positions that count, over the dense model's sum of squares."""
    error = energy = 0.0
    for batch in batches:
        with torch.no_grad():
            found, wanted = (m(**batch).last_hidden_state[batch["attention_mask"].bool()] for m in (model, dense))
        error += (found - wanted).square().sum().item()
        energy += wanted.square().sum().item()
    return error / energy


@pytest.mark.parametrize("structure", ["pivoted", "blast"])
def test_an_encoder_is_refined_towards_the_dense_features(structure):
    dense, model = (tiny_bert().bert.eval() for _ in range(2))
    batches, other = encoder_batches(16, seed=0), encoder_batches(4, seed=1)
    config = BLRConfig(structure, ratio=0.5, num_blocks=2 if structure == "blast" else None, allocation="uniform")
    compress(model, config, calibration=batches, progress=False)
    before = features_apart(model, dense, other)
    history = refine(model, dense, batches, epochs=6, learning_rate=3e-3)
    logged = [entry for entry in history if "distill_loss" in entry]
    # of what is hidden by the mask nothing counts: the loss starts at what the features are apart
    assert logged[0]["distill_loss"] == pytest.approx(features_apart(model, dense, batches), rel=1.0)
    assert all(entry["loss"] == pytest.approx(entry["distill_loss"], rel=0.05) for entry in logged)
    assert "lm_loss" not in logged[0]
    assert features_apart(model, dense, other) < 0.8 * before


def test_the_loss_of_features_is_that_of_positions_that_count():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found, count = feature_loss({"last_hidden_state": student}, {"last_hidden_state": teacher}, mask)
    wanted = (student - teacher)[mask].square().sum() / teacher[mask].square().sum()
    assert found.item() == pytest.approx(wanted.item()) and count == 8
    with pytest.raises(ValueError, match="features of one shape"):
        feature_loss({"last_hidden_state": student}, {"last_hidden_state": teacher[:1]})


def test_no_autocast_stays_behind_a_training_in_mixed_precision(tmp_path):
    model = tiny_llama()
    own = model.forward.__func__
    settings = {"output_dir": tmp_path, "max_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True}
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    train(model, torch.randint(200, (2, 16)), [], bf16=True, use_cpu=True, **settings)
    model(torch.randint(200, (2, 16)))
    handle.remove()
    assert set(seen[:-1]) == {torch.bfloat16} and seen[-1] == torch.float32
    assert model.forward.__func__ is own and not {"forward", "_original_forward"} & set(vars(model))
