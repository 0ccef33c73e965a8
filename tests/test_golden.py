"""Checkpoints written by commit 0d2265a keep loading, and fits keep giving the factors of commit d17df46."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_blr import BLRConfig, compress
from hf_blr.linear import BLRLinear

GOLDEN = Path(__file__).parent / "golden"
#: {folder: what was asked for}; the fifth, `mixed_bfloat16`, is a GPT-2 with a structure for each of its projections
FITTED = {
    "low_rank": {"structure": "low_rank"},
    "pivoted": {"structure": "pivoted"},
    "monarch": {"structure": "monarch", "num_blocks": 2},
    "blast": {"structure": "blast", "num_blocks": (2, 4)},
}


def dense_llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.1, tie_word_embeddings=True)
    return build(LlamaForCausalLM, config)


@pytest.mark.parametrize("name", [*FITTED, "mixed_bfloat16"])
def test_a_golden_checkpoint_loads_bit_for_bit(name):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    stored = load_file(GOLDEN / name / "model.safetensors")
    loaded = model.state_dict()
    for key, value in stored.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key
    expected = load_file(GOLDEN / name / "expected_logits.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    # another CPU may round products otherwise
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits, expected["logits"], rtol=tolerance, atol=tolerance)


def test_the_version_of_a_checkpoint_is_that_of_its_format(tmp_path):
    """Not of the package: what 0.1 wrote is what 0.2 writes, and what a later format wrote is refused."""
    written = json.loads((GOLDEN / "low_rank" / "config.json").read_text())
    assert written["quantization_config"]["version"] == 1
    AutoModelForCausalLM.from_pretrained(GOLDEN / "low_rank").save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["quantization_config"]["version"] == 1
    assert again["quantization_config"]["layers"] == written["quantization_config"]["layers"]
    again["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(again))
    with pytest.raises(ValueError, match="format version 2, this hf_blr reads up to 1.*upgrade hf_blr"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", FITTED)
def test_a_golden_fit_gives_the_same_factors(name):
    model = dense_llama()
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    # with little damping the last digits of a Gram matrix count, and those are another CPU's own
    settings = {"seed": 0, "fit_rounds": 6, "allocation": "uniform", "fisher": False, "damping": 0.3}
    config = BLRConfig(ratio=0.6, **settings, **FITTED[name])
    compress(model, config, calibration=[{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], progress=False)
    golden = load_file(GOLDEN / "fits.safetensors")
    found = {key: module for key, module in model.named_modules() if isinstance(module, BLRLinear)}
    assert found
    for layer, module in found.items():
        stored = {key: golden[f"{name}.{layer}.{key}"] for key in module.tensors()}
        expected = type(module).from_factors(module.spec, stored).dense_weight()
        torch.testing.assert_close(module.dense_weight(), expected, rtol=1e-4, atol=1e-4)
        for key, tensor in module.tensors().items():
            # the sign of an index of the rank is free, and another LAPACK may choose the other
            torch.testing.assert_close(tensor.abs(), stored[key].abs(), rtol=1e-3, atol=1e-3)
