"""Where weights live while a model loads: streaming, device maps, offload to disk."""

import pathlib

import pytest
import torch
from tiny import build, tiny_llama, tiny_logits
from transformers import LlamaConfig, LlamaForCausalLM

from hf_blr.config import BLRConfig
from hf_blr.factorize import Factors
from hf_blr.integration import blr_modules, register, to_dense
from hf_blr.structures import FACTOR

register()

CONFIG = BLRConfig("low_rank", rank=6)
STATUS = pathlib.Path("/proc/self/status")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_llama().save_pretrained(root / "dense")
    LlamaForCausalLM.from_pretrained(root / "dense", blr_config=CONFIG).save_pretrained(root / "blr")
    return root


def split_map():
    """Everything in memory but the second block."""
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}


@pytest.mark.parametrize("source", ["dense", "blr"])
def test_offload_to_disk(source, folders, tmp_path):
    blr_config = CONFIG if source == "dense" else None
    reference = LlamaForCausalLM.from_pretrained(folders / "blr")
    model = LlamaForCausalLM.from_pretrained(
        folders / source, blr_config=blr_config, device_map=split_map(), offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].self_attn.q_proj.u.is_meta
    assert torch.equal(tiny_logits(model), tiny_logits(reference))
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(tiny_logits(again), tiny_logits(reference))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+ is offloaded"):
        to_dense(model)


def test_device_map_counts_the_compressed_size(folders, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folders / "blr")
    compressed = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = sum(p.numel() * p.element_size() for p in tiny_llama().parameters())
    # room for the model, and for the one largest layer that accelerate keeps free
    room = int(1.3 * compressed)
    assert room < 0.8 * dense
    loaded = LlamaForCausalLM.from_pretrained(
        folders / "dense",
        blr_config=CONFIG,
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=tmp_path / "offload",
    )
    assert not [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def anonymous_bytes():
    """Memory of this process that is no mapped file (the checkpoint is one)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_streaming_never_holds_the_dense_model(tmp_path, monkeypatch):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    dense = build(LlamaForCausalLM, LlamaConfig(**sizes, vocab_size=64))
    dense_bytes = sum(p.numel() * p.element_size() for p in dense.parameters())
    dense.save_pretrained(tmp_path)
    del dense
    seen = []

    def fit(weight, spec, **options):
        seen.append(anonymous_bytes())
        return Factors({name: torch.ones(shape) for name, shape in spec.shapes(FACTOR).items()}, 0.0, 0)

    monkeypatch.setattr("hf_blr.integration.streaming.factorize", fit)
    before = anonymous_bytes()
    model = LlamaForCausalLM.from_pretrained(tmp_path, blr_config=BLRConfig("low_rank", rank=4))
    assert len(seen) == len(blr_modules(model)) == 56
    # a load that fits afterwards peaks at 1
    assert max(seen) - before < 0.3 * dense_bytes


def test_where_a_fit_runs(monkeypatch):
    weight = torch.zeros(2, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CONFIG.device_for(weight) == weight.device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert CONFIG.device_for(weight) == torch.device("cuda")
    assert CONFIG.device_for(weight.to("meta")) == torch.device("meta")
    asked = BLRConfig("low_rank", rank=6, fit_device="cpu")
    assert asked.device_for(weight.to("meta")) == torch.device("cpu")
