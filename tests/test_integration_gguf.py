"""GGUF files as dense sources."""

import argparse

import numpy as np
import protocol
import pytest
import quality
import torch
from tiny import VOCAB_SIZE, tiny_llama, tiny_logits, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_blr.bench.report.files import read_result
from hf_blr.cli import loading
from hf_blr.compression import compress
from hf_blr.config import BLRConfig
from hf_blr.integration import blr_modules, register
from hf_blr.integration.source import dequantizing_config

gguf = pytest.importorskip("gguf")
register()

BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds tiny.gguf: the tiny Llama in 16 bits, with q and k rows in an order that no test minds."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_llama()
    config, writer = model.config, gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB_SIZE)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names = {f"{name}.weight": f"{short}.weight" for name, short in outer.items()}
    for layer in range(config.num_hidden_layers):
        for name, short in BLOCK.items():
            names[f"model.layers.{layer}.{name}.weight"] = f"blk.{layer}.{short}.weight"
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        writer.add_tensor(names[name], array if array.ndim == 1 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.fixture(scope="module")
def dense(folder):
    quantization_config = dequantizing_config()
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="tiny.gguf", quantization_config=quantization_config, dtype=torch.float32
    )


@pytest.mark.parametrize("dataset", [None, ["The quick brown fox jumps over the lazy dog. " * 20]])
def test_gguf_file_is_compressed_in_memory(dataset, folder, dense, tmp_path):
    config = BLRConfig("low_rank", rank=6, dataset=dataset, num_samples=4, seqlen=32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="tiny.gguf", blr_config=config, tokenizer=tiny_tokenizer(), dtype=torch.float32
    )
    assert len(blr_modules(model)) == 14
    by_hand = AutoModelForCausalLM.from_config(dense.config)
    by_hand.load_state_dict(dense.state_dict())
    compress(by_hand.eval(), config, tokenizer=tiny_tokenizer(), progress=False)
    torch.testing.assert_close(tiny_logits(model), tiny_logits(by_hand))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def test_gguf_file_without_a_blr_config_loads_as_ever(folder, dense):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    assert not blr_modules(model)
    torch.testing.assert_close(tiny_logits(model), tiny_logits(dense), rtol=1e-3, atol=1e-3)


def test_commands_parse_the_file_once(folder, dense, monkeypatch):
    parsed = []

    class Reader(gguf.GGUFReader):
        def __init__(self, *args):
            parsed.append(self)
            super().__init__(*args)

    make, made = gguf.get_tensor_name_map, []

    def counted(*args):
        made.append(args)
        return make(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    args = argparse.Namespace(gguf_file="tiny.gguf", dtype="float32", device="cpu")
    model, _ = loading.load_model(str(folder), args, reader=False)
    assert torch.equal(tiny_logits(model), tiny_logits(dense)) and len(parsed) == 1
    # views of a memmap are slow, and there are a million of them
    assert all(type(part) is np.ndarray for field in parsed[0].fields.values() for part in field.parts)
    # transformers asks for the names again for each module
    assert len(made) == 1
    assert gguf.GGUFReader is Reader and gguf.get_tensor_name_map is counted


def test_what_was_read_from_gguf_trains_once_compressed(folder):
    """Transformers marks it as quantised, and its Trainer refuses such models."""
    from transformers.trainer_utils import validate_quantization_for_training

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    # 5.17 does so, later releases need not
    model.is_quantized = True
    compress(model, BLRConfig("low_rank", rank=6), progress=False)
    validate_quantization_for_training(model)
    assert not hasattr(model, "hf_quantizer")


def test_the_benchmark_reads_and_refines_it_dense(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "SEQLEN", 16)
    monkeypatch.setattr(quality, "EPOCHS", 1)
    load = quality.loading.load_model

    def marked(*args, **kw):
        model, tokenizer = load(*args, **kw)
        # 5.17 does so
        model.is_quantized = True
        return model, tokenizer

    monkeypatch.setattr(quality.loading, "load_model", marked)
    torch.save({"text": torch.arange(256)}, tmp_path / "ids.pt")
    ids, result = str(tmp_path / "ids.pt"), tmp_path / "q.json"
    where = ["--model", str(folder), "--gguf-file", "tiny.gguf", "--device", "cpu", "--json", str(result)]
    quality.main([*where, "--texts", ids, "--parts", ids, "--calibration", "text", "--only", "1 dense, refined at 1"])
    rows = read_result(result)["rows"]
    assert [row["method"] for row in rows] == ["dense", "dense, its 4-bit GGUF file", "dense, refined at 1"]
    assert rows[1]["bytes"] == (folder / "tiny.gguf").stat().st_size
    assert rows[2]["ppl"] < rows[0]["ppl"] and rows[2]["kept"] == 1.0
