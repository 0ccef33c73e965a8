"""Checkpoints and configs that must not load: each error names the tensors, and nothing stays random."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_logits
from transformers import AutoConfig, LlamaForCausalLM

from hf_blr.config import BLRConfig
from hf_blr.integration import blr_modules, register

register()

CONFIG = BLRConfig("low_rank", rank=6)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense checkpoint and its compressed form."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_llama().save_pretrained(root / "dense")
    LlamaForCausalLM.from_pretrained(root / "dense", blr_config=CONFIG).save_pretrained(root / "blr")
    return root


def edited(source, target, edit):
    """A copy of a checkpoint folder with its tensors changed."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


BROKEN = {
    "factor missing": (lambda t: t.pop(f"{Q}.u"), rf"Missing .*{Q}\.u\."),
    "norm missing": (lambda t: t.pop("model.norm.weight"), r"Missing .*model\.norm\.weight"),
    "factor misshapen": (
        lambda t: t.update({f"{Q}.u": torch.zeros(64, 5)}),
        rf"{Q}\.u \(shape \(64, 5\).*\(64, 6\)",
    ),
    "dense weight beside factors": (
        lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}),
        rf"{Q}\.weight",
    ),
    "factor of another structure": (lambda t: t.update({f"{Q}.s": torch.zeros(1)}), rf"{Q}\.s \(a low_rank"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_blr_checkpoint(case, folders, tmp_path):
    edit, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(edited(folders / "blr", tmp_path / "broken", edit))


def test_misshapen_dense_tensor_in_a_blr_checkpoint(folders, tmp_path):
    def edit(tensors):
        tensors["model.norm.weight"] = torch.ones(63)

    # newer releases see it themselves
    with pytest.raises((ValueError, RuntimeError), match=r"model\.norm\.weight|ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(edited(folders / "blr", tmp_path / "broken", edit))


def test_factors_of_a_module_that_the_config_does_not_list(folders, tmp_path):
    folder = edited(folders / "blr", tmp_path / "broken", lambda tensors: None)
    stored = json.loads((folder / "config.json").read_text())
    del stored["quantization_config"]["layers"][Q]
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"{Q}\.u .*do not list this module"):
        LlamaForCausalLM.from_pretrained(folder)


def test_dense_weights_with_a_config_of_a_compressed_model(folders):
    stored = AutoConfig.from_pretrained(folders / "blr")
    with pytest.raises(ValueError, match="Load a dense checkpoint with blr_config="):
        LlamaForCausalLM.from_pretrained(folders / "dense", config=stored)


def test_state_dict_without_a_factor(folders):
    model = LlamaForCausalLM.from_pretrained(folders / "blr")
    state = model.state_dict()
    whole = LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    assert torch.equal(tiny_logits(whole), tiny_logits(model))
    del state[f"{Q}.v"]
    with pytest.raises(ValueError, match=rf"Missing .*{Q}\.v"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, folders, tmp_path):
    def edit(tensors):
        tensors[f"{Q}.weight"][3, 5] = value

    folder = edited(folders / "dense", tmp_path / "broken", edit)
    with pytest.raises(ValueError, match=rf"{Q}\.weight: 1 of 4096 values are NaN or infinite"):
        LlamaForCausalLM.from_pretrained(folder, blr_config=CONFIG)


def test_dense_weight_missing_or_misshapen(folders, tmp_path):
    folder = edited(folders / "dense", tmp_path / "missing", lambda tensors: tensors.pop(f"{Q}.weight"))
    with pytest.raises(ValueError, match=rf"{Q}\.weight: the checkpoint has no such weight"):
        LlamaForCausalLM.from_pretrained(folder, blr_config=CONFIG)

    def edit(tensors):
        tensors[f"{Q}.weight"] = torch.zeros(64, 63)

    folder = edited(folders / "dense", tmp_path / "misshapen", edit)
    with pytest.raises(ValueError, match=rf"{Q}\.weight: .*expects the shape \(64, 64\).*\(64, 63\)"):
        LlamaForCausalLM.from_pretrained(folder, blr_config=CONFIG)


def test_tied_head(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = BLRConfig("low_rank", rank=6, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        LlamaForCausalLM.from_pretrained(tmp_path, blr_config=config)


def test_untied_head(folders):
    config = BLRConfig("low_rank", rank=6, target_modules=["lm_head"])
    model = LlamaForCausalLM.from_pretrained(folders / "dense", blr_config=config)
    assert list(blr_modules(model)) == ["lm_head"]


def test_layout_of_another_model(folders, tmp_path):
    folder = edited(folders / "blr", tmp_path / "broken", lambda tensors: None)
    stored = json.loads((folder / "config.json").read_text())
    stored["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"layers\.0.*: the plan says .*96 -> 64.*, the model has .*96 -> 32"):
        LlamaForCausalLM.from_pretrained(folder)
    layers = stored["quantization_config"]["layers"]
    stored["quantization_config"]["layers"] = {f"elsewhere.{name}": layer for name, layer in layers.items()}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="none of the 14 compressed modules"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("keyword", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_tensor_parallelism(keyword, folders):
    with pytest.raises(NotImplementedError, match="tensor or expert parallelism"):
        LlamaForCausalLM.from_pretrained(folders / "dense", blr_config=CONFIG, **keyword)


@pytest.mark.parametrize("asked", [{"passes": 2}, {"block_steps": 2}, {"allocation": "loss"}, {"structure": "auto"}])
def test_what_takes_text_is_refused_while_weights_stream_in(asked, folders):
    config = BLRConfig(**{"structure": "low_rank", "ratio": 0.5, **asked})
    with pytest.raises(ValueError, match="and there is none: give text"):
        LlamaForCausalLM.from_pretrained(folders / "dense", blr_config=config)
