"""LoRA adapters on BLR modules: trained, saved, loaded through every door, never merged by mistake."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny import batches_for, tiny_inputs, tiny_llama, tiny_logits
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_blr import BLRCallback, collect_statistics, compress
from hf_blr.config import BLRConfig
from hf_blr.finetune import train
from hf_blr.integration import blr_modules, from_config, lora_targets, register, to_dense

register()

# PEFT reads an attribute that newer transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_llama().save_pretrained(root / "dense")
    config = BLRConfig("monarch", ratio=0.6)
    LlamaForCausalLM.from_pretrained(root / "dense", blr_config=config).save_pretrained(root / "blr")
    return root / "blr"


@pytest.fixture
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder)


def adapted(model, **kwargs):
    """A PEFT model whose adapters do something."""
    kwargs.setdefault("target_modules", lora_targets(model))
    peft_model = get_peft_model(model, LoraConfig(r=4, **kwargs)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return peft_model


def test_targets_are_the_blr_modules(model):
    assert lora_targets(model) == list(blr_modules(model))
    with pytest.raises(ValueError, match="no BLR modules"):
        lora_targets(tiny_llama())


def test_only_adapters_train_and_they_do(model):
    base = tiny_logits(model)
    peft_model = adapted(model)
    assert not torch.equal(tiny_logits(peft_model), base)
    inputs = tiny_inputs(model)
    peft_model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 14
    assert all("lora_" in name for name in trained)
    assert torch.equal(tiny_logits(peft_model.unload()), base)


def test_adapter_reloads_through_every_door(model, folder, tmp_path):
    peft_model = adapted(model)
    reference = tiny_logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    doors = {
        "PeftModel": PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path),
        "AutoModel": AutoModelForCausalLM.from_pretrained(tmp_path),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(tmp_path),
    }
    for door, loaded in doors.items():
        assert torch.equal(tiny_logits(loaded.eval()), reference), door


def test_merging_raises(model):
    peft_model = adapted(model)
    for merge in (peft_model.merge_and_unload, peft_model.merge_adapter, peft_model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match="merged"):
            merge()


def test_merging_works_on_the_dense_model(model, tmp_path):
    # what the error advises
    reference = tiny_logits(peft_model := adapted(model))
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries an adapter"):
        to_dense(model)
    dense = to_dense(peft_model.unload())
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    torch.testing.assert_close(tiny_logits(merged), reference, rtol=1e-3, atol=1e-3)


def test_adapters_train_save_and_reload_on_layers_in_bits(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    overrides = {"down_proj": {"structure": "dense"}}
    config = BLRConfig("low_rank", ratio=0.7, factor_format="int4", dense_format="fp8", overrides=overrides)
    LlamaForCausalLM.from_pretrained(tmp_path / "dense", blr_config=config).save_pretrained(tmp_path / "bits")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "bits")
    stored = {name: part.clone() for name, part in model.state_dict().items()}
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=lora_targets(model)))
    windows = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    history = train(
        peft_model,
        windows,
        [BLRCallback()],
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
    )
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.97 * losses[0]
    left = peft_model.get_base_model().state_dict()
    kept = {name.replace(".base_layer", ""): part for name, part in left.items()}
    assert all(torch.equal(kept[name].view(torch.uint8), part.view(torch.uint8)) for name, part in stored.items())
    with pytest.raises(NotImplementedError, match="cannot be merged exactly into block low-rank"):
        peft_model.merge_and_unload()
    reference = tiny_logits(peft_model.eval())
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "bits"), tmp_path / "adapter")
    assert torch.equal(tiny_logits(again.eval()), reference)


def test_variants_that_need_a_dense_weight():
    with pytest.raises(NotImplementedError, match="init_lora_weights='pissa'"):
        adapted(tiny_blr(), init_lora_weights="pissa")


def tiny_blr():
    return from_config(tiny_llama().config, LlamaForCausalLM, blr_config=BLRConfig("low_rank", rank=6))


def test_adapter_takes_dtype_and_default_targets(model):
    peft_model = get_peft_model(model.to(torch.bfloat16), LoraConfig(r=4), autocast_adapter_dtype=False)
    adapters = [parameter for name, parameter in peft_model.named_parameters() if "lora_" in name]
    assert adapters
    assert {parameter.dtype for parameter in adapters} == {torch.bfloat16}


def with_adapters(kind):
    """A model in each of the states in which adapters are met."""
    base, lora = tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    if kind == "injected":
        # as add_adapter of transformers does it
        return inject_adapter_in_model(lora, base)
    if kind == "prompt":
        return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    if kind == "saved head":
        return get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).get_base_model()
    peft_model = get_peft_model(base, lora)
    return peft_model if kind == "peft model" else peft_model.get_base_model()


@pytest.mark.parametrize("kind", ["peft model", "base model", "injected", "prompt", "saved head"])
def test_a_model_with_adapters_is_not_compressed(kind):
    model = with_adapters(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (compress, collect_statistics):
        with pytest.raises(ValueError, match=r"of PEFT.*merge_and_unload\(\).*unload\(\).*add adapters afterwards"):
            call(model, BLRConfig("low_rank", ratio=0.6), calibration=batches_for(tiny_llama(), 1))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("take_off", ["merge_and_unload", "unload"])
def test_a_model_is_compressed_once_its_adapters_are_off(take_off):
    # what the error advises
    model = getattr(with_adapters("peft model"), take_off)()
    compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    assert len(blr_modules(model)) == 14
