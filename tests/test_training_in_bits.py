"""Factors in bits that train: what the form for it computes, what steps move, what is stored and when."""

import copy
import math

import pytest
import torch
from format_cases import SMALL_SPECS, same
from tiny import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_blr import BLRCallback, BLRConfig, compress
from hf_blr.calibration.held_out import HeldOut
from hf_blr.calibration.training_form import factors_in_bits, open_bits, trained_bits, training_form
from hf_blr.finetune import WindowDataset, close_bits, factor_parameter_groups, mark_only_factors_trainable, refine
from hf_blr.finetune.trainable import FEW_BITS_RATE, SCALES_RATE, WHOLE_RATE
from hf_blr.formats import FactorInBits, FactorInTraining, format_named
from hf_blr.linear import BLRLinear
from hf_blr.structures import LowRank

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
WHOLE = "model.layers.0.mlp.up_proj"
FORMATS = [("int8", None), ("int4", 8), ("int3", None), ("int2", 8), ("fp8", None)]


def held_in(name, size=None, shape=(6, 24)):
    held = FactorInBits(format_named(name, size), shape)
    held.take(held.storage.nearest(torch.randn(*shape, generator=torch.Generator().manual_seed(0))))
    return held


def in_bits(structure="low_rank", bits="int3", **settings):
    """A tiny model of that structure in bits, fitted to random tokens."""
    whole = structure == "dense"
    size = {"dense_format": bits} if whole else {"ratio": 0.8, "factor_format": bits, "allocation": "uniform"}
    blocks = {"num_blocks": 2} if structure in ("blast", "monarch") else {}
    model = tiny_llama()
    config = BLRConfig(structure, **size, **blocks, fisher=False, **settings)
    compress(model, config, calibration=list(WINDOWS.split(4)), progress=False)
    return model


def parts_of(model):
    return {
        f"{name}.{leaf}": part.clone()
        for name, held in factors_in_bits(model).items()
        for leaf, part in held.parts().items()
    }


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name, size", FORMATS)
def test_the_form_computes_what_is_stored_and_is_stored_as_it_was(name, size, codes):
    held = held_in(name, size)
    form = FactorInTraining(held, codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(form(dtype), held(dtype))
    for leaf, part in held.parts().items():
        assert form.parts()[leaf].dtype == part.dtype and torch.equal(form.parts()[leaf], part)


@pytest.mark.parametrize("name, size", FORMATS)
def test_gradients_take_rounding_for_the_identity(name, size):
    held = held_in(name, size)
    form, weight = FactorInTraining(held, True), torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    (form(torch.float32) * weight).sum().backward()
    groups = held.parts()["weight_scale"].shape[-1]
    # a relative step of a scale moves each of its numbers by that share of it
    of_scales = (held(torch.float32) * weight).unflatten(-1, (groups, -1)).sum(-1)
    torch.testing.assert_close(form.log_scale.grad, of_scales, rtol=1e-4, atol=1e-5)
    # as if they were numbers
    torch.testing.assert_close(form.latent.grad, weight)
    fixed = FactorInTraining(held, False)
    (fixed(torch.float32) * weight).sum().backward()
    assert torch.equal(fixed.log_scale.grad, form.log_scale.grad) and fixed.latent.grad is None


@pytest.mark.parametrize("name, size", FORMATS)
def test_steps_move_what_is_stored(name, size):
    form = FactorInTraining(held_in(name, size), True)
    before = form.stored()
    with torch.no_grad():
        form.log_scale += 0.5
        form.latent += 1.1 * form.storage.spacing * form.start.repeat_interleave(24 // form.start.shape[-1], -1)
    after = form.stored()
    ratio = after.parts()["weight_scale"].float() / before.parts()["weight_scale"].float()
    assert (ratio / math.exp(0.5) - 1).abs().max() < 2**-7
    moved = after.storage.codes(after.parts(), after.shape).values.float()
    first = before.storage.codes(before.parts(), before.shape).values.float()
    assert ((moved > first) | (first == first.max())).float().mean() > 0.8
    assert torch.equal(form(torch.float32), after(torch.float32))


def test_scales_stay_finite_and_positive():
    form = FactorInTraining(held_in("int4", 8), False)
    for log in (-1e4, 1e4):
        form.log_scale.data.fill_(log)
        scale = form.parts()["weight_scale"]
        assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("what", ["scales", "codes"])
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.structure)
def test_layers_compute_and_save_the_same_while_they_train(spec, what):
    torch.manual_seed(0)
    layer = BLRLinear.from_spec(spec, storage=format_named("int4", 8))
    root, x = nn.Sequential(layer), torch.randn(5, 48)
    stored, out = copy.deepcopy(root), layer(x)
    open_bits(root, what)
    assert torch.equal(layer(x), out) and layer.device == x.device
    same(root, stored)
    state = {key: value.clone() for key, value in root.state_dict().items()}
    with torch.no_grad():
        for parameter in trained_bits(root):
            parameter += 0.3
    assert not torch.equal(layer(x), out)
    root.load_state_dict(state)
    assert torch.equal(layer(x), out)
    broken = {key: value for key, value in state.items() if not key.endswith("scale")}
    with pytest.raises(RuntimeError, match=r"0\.\w\.weight_scale"):
        root.load_state_dict(broken)
    again = copy.deepcopy(root)
    assert torch.equal(again(x), out)
    close_bits(root)
    assert all(
        isinstance(held, FactorInBits) and not any(p.requires_grad for p in held.parameters())
        for held in factors_in_bits(root).values()
    )
    same(root, stored)


def test_forms_are_not_cast_with_the_model():
    root = nn.Sequential(BLRLinear.from_spec(LowRank(48, 32, 16), storage=format_named("int4", 8)))
    open_bits(root, "codes")
    before = [p.clone() for p in trained_bits(root)]
    root.half().bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(trained_bits(root), before, strict=True))
    assert root[0].bias.dtype == root[0](torch.ones(1, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "monarch", "blast", "dense"])
def test_refinement_of_scales_lowers_the_loss_and_moves_no_code(structure):
    model, dense = in_bits(structure), tiny_llama()
    before = parts_of(model)
    numbers = {name: p.clone() for name, p in model.named_parameters()}
    how = {"epochs": 8, "batch_size": 4, "learning_rate": 1e-2, "distill_weight": 1.0}
    history = refine(model, dense, WINDOWS, **how, bits="scales")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.97 * losses[0]
    after = parts_of(model)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if key.endswith("weight_scale")}
    others = {name for name, p in model.named_parameters() if name not in after and not torch.equal(p, numbers[name])}
    # s of BLAST is no factor in bits
    assert all(name.endswith(".s") for name in others) and bool(others) == (structure == "blast")


def with_whole_matrices():
    """In int4 both: factors, and one matrix that stays whole."""
    model = tiny_llama()
    bits = {"factor_format": "int4", "dense_format": "int4", "group_size": 16}
    compress(model, BLRConfig("low_rank", rank=16, **bits, overrides={WHOLE: {"structure": "dense"}}), progress=False)
    return model


def test_refinement_moves_codes_of_factors_alone_unless_told_otherwise():
    def moved(model, **how):
        before = parts_of(model)
        refine(model, tiny_llama(), WINDOWS, epochs=4, batch_size=8, learning_rate=2e-2, **how)
        return {key for key, part in parts_of(model).items() if not torch.equal(part, before[key])}

    model = with_whole_matrices()
    names = parts_of(model).keys()
    codes = {key for key in names if key.endswith("packed")}
    whole = {key for key in codes if WHOLE in key}
    assert whole and moved(model) & codes == codes - whole
    assert moved(with_whole_matrices(), bits="codes") & codes == codes


def test_codes_have_rates_of_their_own_by_bits_and_by_what_they_are():
    model = with_whole_matrices()
    mark_only_factors_trainable(model, bits="codes")
    rates = {id(p): group["lr"] for group in factor_parameter_groups(model, 1e-3) for p in group["params"]}
    for name, form in factors_in_bits(model).items():
        whole = WHOLE_RATE if WHOLE in name else 1
        assert rates[id(form.latent)] == pytest.approx(FEW_BITS_RATE * whole * 1e-3)
        assert rates[id(form.log_scale)] == pytest.approx(SCALES_RATE * 1e-3)
    eight = in_bits(bits="int8")
    mark_only_factors_trainable(eight, bits="factor_codes")
    rates = [group["lr"] for group in factor_parameter_groups(eight, 1e-3)]
    assert rates == pytest.approx([SCALES_RATE * 1e-3, 1e-3])


def test_refinement_of_codes_moves_them_too(capsys):
    model = in_bits()
    before = parts_of(model)
    history = refine(
        model, tiny_llama(), WINDOWS, epochs=30, batch_size=8, learning_rate=5e-3, distill_weight=1.0, bits="codes"
    )
    assert "codes and scales of factors in bits of" in capsys.readouterr().out
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    after = parts_of(model)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved >= {key for key in after if "scale" in key} and any("packed" in key for key in moved)


@pytest.mark.parametrize("bits", ["scales", "factor_codes", "codes"])
@pytest.mark.parametrize("structure", ["pivoted", "dense"])
def test_refinement_that_ruins_a_model_puts_its_bits_back(structure, bits):
    model = in_bits(structure)
    before = copy.deepcopy(model)
    windows = torch.randint(0, 256, (80, 32), generator=torch.Generator().manual_seed(2))
    history = refine(model, tiny_llama(), windows, epochs=1, batch_size=2, learning_rate=3.0, bits=bits, held_out=OTHER)
    assert sum("held_out_divergence" in entry for entry in history) == 4
    same(model, before)


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_codes_of_eight_bits_train_at_the_rate_of_factors_like_them(bits):
    model, plain = in_bits(bits=bits), in_bits(bits="plain")
    held_out = HeldOut(tiny_llama(), [{"input_ids": WINDOWS}])
    before = held_out.divergence(plain)
    how = {"epochs": 4, "batch_size": 4, "distill_weight": 1.0, "bits": "codes"}
    for each in (model, plain):
        refine(each, tiny_llama(), WINDOWS, **how, learning_rate=1e-3)
    after = held_out.divergence(plain)
    assert abs(held_out.divergence(model) - after) < 0.3 * (before - after)


def arguments(folder, **more):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    return TrainingArguments(
        str(folder), **{**settings, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **more}
    )


def test_a_stock_trainer_trains_scales_and_its_checkpoints_are_the_models(tmp_path, capsys):
    model = in_bits()
    before = parts_of(model)
    callback = BLRCallback()
    trainer = Trainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=WindowDataset(WINDOWS),
        callbacks=[callback],
    )
    assert isinstance(factors_in_bits(model)["model.layers.0.self_attn.q_proj.u"], FactorInTraining)
    trainer.train()
    assert "scales of factors in bits of a model with 14 BLR modules" in capsys.readouterr().out
    assert not trained_bits(model)
    after = parts_of(model)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        key for key in after if "scale" in key
    }
    same(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4"), model)
    # again, with the same optimizer
    trainer.train()
    assert not trained_bits(model)
    assert all(not torch.equal(part, after[key]) for key, part in parts_of(model).items() if "scale" in key)


def test_a_training_goes_on_from_its_checkpoint_and_ends_with_the_best(tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    data = {"train_dataset": WindowDataset(WINDOWS), "eval_dataset": WindowDataset(OTHER)}
    model = in_bits()
    args = arguments(tmp_path, **how, load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=1.0)
    trainer = Trainer(model, args, **data, callbacks=[BLRCallback()])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    same(LlamaForCausalLM.from_pretrained(best), model)
    resumed = in_bits()
    Trainer(resumed, arguments(tmp_path, max_steps=6), **data, callbacks=[BLRCallback()]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert not trained_bits(resumed)


def test_a_loop_of_ones_own():
    model = in_bits("blast")
    trained, total = mark_only_factors_trainable(model, bits="codes")
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad) < total
    groups = factor_parameter_groups(model, 1e-3, other_lr=1e-4)
    assert [group["lr"] for group in groups] == [1e-3, SCALES_RATE * 1e-3, FEW_BITS_RATE * 1e-3]
    scales = {id(p) for p in groups[1]["params"]}
    assert scales == {id(form.log_scale) for form in factors_in_bits(model).values()}
    optimizer = torch.optim.AdamW(groups)
    ids = WINDOWS[:4]
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # from codes to scales in the middle: what is stored stays
    stored = copy.deepcopy(model.state_dict())
    mark_only_factors_trainable(model)
    assert all(
        torch.equal(value.view(torch.uint8), stored[key].view(torch.uint8)) for key, value in model.state_dict().items()
    )
    # s of BLAST, and the scales
    assert len(factor_parameter_groups(model, 1e-3)) == 2
    close_bits(model)
    assert not trained_bits(model)


def test_what_trains_is_named_right():
    model = in_bits()
    for call in (
        lambda: mark_only_factors_trainable(model, bits="all"),
        lambda: refine(model, tiny_llama(), WINDOWS, bits="all"),
        lambda: BLRCallback(train_bits="all"),
    ):
        with pytest.raises(ValueError, match="must be one of 'scales', 'factor_codes', 'codes', got 'all'"):
            call()
    assert not trained_bits(model)


def test_a_form_ends_with_an_error_inside():
    model = in_bits()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt), training_form(model, "codes"):
        raise KeyboardInterrupt
    same(model, before)
