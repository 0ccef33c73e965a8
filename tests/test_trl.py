"""`trl.SFTTrainer` on compressed models: factors, adapters on factors, and losses that leave a teacher no logits."""

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer
from trainer_cases import arguments, changed, factor_names, state, windows

from hf_blr import BLRCallback, BLRConfig, compress

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# PEFT and TRL ask transformers for it, not this project
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def compressed(**config):
    model = tiny_llama()
    compress(model, BLRConfig("blast", ratio=0.6, fit_rounds=2, **config), progress=False)
    return model


def sft_trainer(model, path, teacher=None, peft_config=None, **kw):
    return trl.SFTTrainer(
        model,
        # it computes in bfloat16 where nobody objects
        arguments(path, trl.SFTConfig, bf16=False, **kw),
        train_dataset=datasets.Dataset.from_dict({"input_ids": windows().tolist()}),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[BLRCallback(teacher=teacher)],
    )


def steps_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def test_factors_alone_train_towards_a_teacher(tmp_path):
    model = compressed()
    before = state(model)
    trainer = sft_trainer(model, tmp_path, teacher=tiny_llama(), loss_type="nll")
    trainer.train()
    assert changed(before, model) == factor_names(model)
    for line in steps_of(trainer):
        assert line["loss"] == pytest.approx((line["lm_loss"] + line["distill_loss"]) / 2, rel=1e-3)
    trainer.save_model(str(tmp_path / "tuned"))
    saved = type(model).from_pretrained(tmp_path / "tuned")
    assert changed(state(model), saved) == set()


def test_without_a_teacher_its_default_loss_will_do(tmp_path):
    model = compressed()
    before = state(model)
    trainer = sft_trainer(model, tmp_path)
    trainer.train()
    first, *_, last = (line["loss"] for line in steps_of(trainer))
    assert changed(before, model) == factor_names(model) and last < first


@pytest.mark.parametrize("loss_type", ["chunked_nll", "dft"])
def test_a_loss_without_logits_says_what_a_teacher_needs(loss_type, tmp_path):
    trainer = sft_trainer(compressed(), tmp_path, teacher=tiny_llama(), loss_type=loss_type)
    with pytest.raises(ValueError, match='SFTConfig loss_type="nll"'):
        trainer.train()


@pytest.mark.parametrize("bits", [{}, {"factor_format": "int4"}], ids=["plain", "int4"])
def test_adapters_on_factors_train_towards_a_teacher(bits, tmp_path):
    model = compressed(**bits)
    before = state(model)
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = sft_trainer(model, tmp_path, teacher=tiny_llama(), peft_config=lora, loss_type="nll")
    trainer.train()
    assert {name.split(".")[-3] for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    plain = trainer.model.unload().state_dict()
    assert all(torch.equal(plain[name], value) for name, value in before.items())
    assert all("distill_loss" in line for line in steps_of(trainer))
