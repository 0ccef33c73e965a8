"""Checkpoints whose shards are written while the model is being compressed."""

import copy

import pytest
import torch
from resume_cases import Killed, killed_at, reads_disk, same_bits
from tiny import batches_for, tiny_llama, tiny_logits, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_blr import BLRConfig, compress
from hf_blr.cli import main
from hf_blr.compression import Shards, replace
from hf_blr.linear import blr_modules

#: bytes; a block of the tiny model's factors takes more
SMALL = 10_000
CONFIGS = {
    "weights": {"structure": "low_rank"},
    "text": {"structure": "pivoted"},
    "refined": {"structure": "low_rank", "block_steps": 3},
    "bits": {"structure": "low_rank", "factor_format": "int8", "group_size": 8},
    "turned": {"structure": "low_rank", "turned": True},
}


@pytest.fixture(params=CONFIGS)
def case(request):
    model = tiny_llama(num_hidden_layers=4)
    config = BLRConfig(ratio=0.5, allocation="uniform", **CONFIGS[request.param])
    return model, config, None if request.param == "weights" else batches_for(model)


def test_finished_blocks_leave_memory_and_the_checkpoint_is_the_same(case, tmp_path, monkeypatch):
    model, config, batches = case
    straight, held, fit = copy.deepcopy(model), [], replace.factorize

    def watched(*args):
        layers = blr_modules(model).values()
        held.append(sum(not next(layer.parameters()).is_meta for layer in layers))
        return fit(*args)

    compress(straight, config, calibration=batches, progress=False)
    monkeypatch.setattr(replace, "factorize", watched)
    shards = Shards(tmp_path, SMALL)
    compress(model, config, calibration=batches, shards=shards, progress=False)
    # a block, and the first layer of the next, with which the one before is written
    assert max(held) <= 8 and len(held) == 28
    assert len(list(tmp_path.glob("finished-*"))) == 3
    assert torch.equal(tiny_logits(model), tiny_logits(straight))
    shards.save(model)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert same_bits(LlamaForCausalLM.from_pretrained(tmp_path), straight)


def test_a_model_that_fits_into_a_shard_has_one_file(tmp_path):
    shards, model = Shards(tmp_path), tiny_llama()
    compress(model, BLRConfig("low_rank", ratio=0.5), shards=shards, progress=False)
    shards.save(model)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert same_bits(LlamaForCausalLM.from_pretrained(tmp_path), model)


@reads_disk
def test_the_command_line_writes_shards_beside_and_resumes(tmp_path, monkeypatch):
    dense, out, seen = tmp_path / "dense", tmp_path / "out", []
    tiny_llama(num_hidden_layers=4).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    options = ["--ratio", "0.5", "--structure", "low_rank", "--dataset", "none", "--device", "cpu", "--offload-weights"]
    options += ["--resume", str(tmp_path / "journal"), "--max-shard-size", "10KB"]
    straight = tmp_path / "straight"
    assert main(["compress", str(dense), str(straight), *options[:8]]) == 0
    with monkeypatch.context() as patch:
        killed_at(patch, 24)
        with pytest.raises(Killed):
            main(["compress", str(dense), str(out), *options])
    assert not out.exists()
    fit = replace.factorize
    monkeypatch.setattr(
        replace, "factorize", lambda *a: seen.append(len(list(tmp_path.glob(".out-*/finished-*")))) or fit(*a)
    )
    assert main(["compress", str(dense), str(out), *options]) == 0
    # layers of the first run were read back, and written beside before the next fit
    assert len(seen) < 28 and seen[0] >= 2
    assert not list(tmp_path.glob(".out-*")) and not (tmp_path / "journal").exists()
    assert (out / "model.safetensors.index.json").exists()
    assert same_bits(*(AutoModelForCausalLM.from_pretrained(path) for path in (out, straight)))
