"""A stock Trainer on checkpoints in 16 bits, steps without labels, fresh heads, and parts that stay frozen."""

import copy

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from torch.utils.data import Dataset
from trainer_cases import arguments, changed, factor_names, state, trainer_for, windows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    Trainer,
)

import hf_blr
from hf_blr import BLRConfig
from hf_blr.finetune import BLRCallback, WindowDataset, mark_only_factors_trainable
from hf_blr.integration import blr_modules


def compressed(make=tiny_llama, structure="blast", **kw):
    model = make()
    hf_blr.compress(model, BLRConfig(structure, ratio=0.6, **kw), progress=False)
    return model


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Kept(BLRCallback):
    """Keeps the factors as they are when the last step is done, `[numbers]` in float32."""

    def on_train_end(self, args, state, control, **kwargs):
        self.factors = numbers(kwargs["model"])
        super().on_train_end(args, state, control, **kwargs)


def numbers(model):
    modules = blr_modules(model).values()
    return torch.cat([f.detach().float().flatten() for module in modules for f in module.factors().values()])


@pytest.mark.parametrize("structure", ["pivoted", "blast"])
def test_factors_in_bfloat16_train_as_float32_numbers(structure, tmp_path):
    start = compressed(structure=structure).bfloat16()

    def trained(model, **kw):
        kept = Kept(**kw)
        trainer_for(model, tmp_path, kept, max_steps=8, learning_rate=1e-4).train()
        return kept.factors

    masters = copy.deepcopy(start)
    right, ours, rounded = (
        trained(copy.deepcopy(start).float()),
        trained(masters),
        trained(start, float32_factors=False),
    )
    moved = (right - numbers(compressed(structure=structure).bfloat16())).norm()
    # what is left is the rounding of activations, not of steps
    assert (ours - right).norm() < 0.3 * moved and (rounded - right).norm() > 0.6 * moved
    assert {p.dtype for p in masters.parameters()} == {torch.bfloat16}
    assert torch.equal(numbers(masters), ours.bfloat16().float())


def test_a_training_of_masters_resumes_from_its_checkpoint_and_saves_16_bits(tmp_path):
    start = compressed().bfloat16()
    through, stopped, resumed = (copy.deepcopy(start) for _ in range(3))
    settings = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-4}
    trainer_for(through, tmp_path / "a", max_steps=6, **settings).train()
    trainer_for(stopped, tmp_path / "b", max_steps=6, **settings).train()
    checkpoint = tmp_path / "b" / "checkpoint-3"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    trainer = trainer_for(resumed, tmp_path / "b", max_steps=6, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not changed(state(through), resumed)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert not changed(state(resumed), again) and again.dtype == torch.bfloat16


def test_a_callback_that_comes_late_widens_too(tmp_path):
    seen = []

    class Late(BLRCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            seen.append({module.dtype for module in blr_modules(kwargs["model"]).values()})

    model = compressed().bfloat16()
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=WindowDataset(windows()))
    trainer.add_callback(Late())
    trainer.train()
    assert seen == [{torch.float32}] and {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Labelled(Dataset):
    """Windows, of which those that `masked` names have no label."""

    def __init__(self, masked, classes=False):
        self.windows, self.masked, self.classes = windows(), masked, classes

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        ids = self.windows[index]
        labels = torch.tensor(index % 3) if self.classes else ids.clone()
        return {"input_ids": ids, "labels": torch.full_like(labels, -100) if self.masked(index) else labels}


@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_a_step_without_any_label_changes_nothing(make, teacher, tmp_path):
    if make is tiny_bert and not teacher:
        pytest.skip("a dense classifier's own loss is a mean over nothing")
    model = compressed(make)
    before = state(model)
    callback = BLRCallback(teacher=make() if teacher else None)
    data = Labelled(lambda index: True, classes=make is tiny_bert)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=data, callbacks=[callback])
    trainer.train()
    assert not changed(before, model) and losses(trainer) == [0.0, 0.0]
    assert not any("distill_loss" in entry for entry in trainer.state.log_history)


def test_micro_batches_without_labels_add_nothing(tmp_path):
    models, teacher = [compressed() for _ in range(2)], tiny_llama()
    # windows 1 and 3 of each four have labels; the other model never sees those without
    some = Labelled(lambda index: index % 2 == 0)
    rest = torch.utils.data.Subset(some, [index for index in range(len(some)) if index % 2])
    for model, data, accumulate in ((models[0], some, 4), (models[1], rest, 2)):
        settings = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate}
        settings |= {"train_sampling_strategy": "sequential"}
        callback = BLRCallback(teacher=teacher)
        Trainer(model, arguments(tmp_path, **settings), train_dataset=data, callbacks=[callback]).train()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name])


def test_a_head_that_no_checkpoint_brought_trains_with_the_factors(tmp_path, capsys):
    compressed().save_pretrained(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    assert isinstance(model, LlamaForSequenceClassification)
    before = state(model)
    data = Labelled(lambda index: False, classes=True)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[BLRCallback()])
    trainer.train()
    assert changed(before, model) == factor_names(model) | {"score.weight"}
    assert "factors, a fresh head of a model" in capsys.readouterr().out
    # saved and loaded, it is as known as all others
    trainer.save_model(tmp_path / "classifier")
    known = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    mark_only_factors_trainable(known)
    assert {name for name, p in known.named_parameters() if p.requires_grad} == factor_names(known)


@pytest.mark.parametrize("door", ["keyword", "compress"])
def test_a_fresh_head_of_a_dense_checkpoint_is_known_too(door, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = BLRConfig("low_rank", ratio=0.6)
    asked = {"blr_config": config} if door == "keyword" else {}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **asked)
    if door == "compress":
        hf_blr.compress(model, config, progress=False)
    mark_only_factors_trainable(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == factor_names(model) | {"score.weight"}


def test_one_warning_names_what_stays_frozen(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_blr.finetune.callback.logger.warning", warned.append)
    formats = {"up_proj": {"factor_format": "int8", "structure": "low_rank"}}
    model = compressed(modules_to_not_convert=["k_proj"], overrides=formats)
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.train()
    trainer.train()
    # of those in bits the scales train
    assert len(warned) == 1 and "up_proj" not in warned[0]
    assert "2 projections left dense (train_also takes names): model.layers.0.self_attn.k_proj, ..." in warned[0]
    warned.clear()
    trainer_for(model, tmp_path, BLRCallback(train_also=["k_proj"]), max_steps=1).train()
    assert not warned
    trainer_for(compressed(), tmp_path, max_steps=1).train()
    assert not warned
