"""What the looks into a checkpoint's folder leave to others, and what they name."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_bert, tiny_llama
from transformers import AutoConfig, BertForSequenceClassification, BertForTokenClassification, LlamaForCausalLM

from hf_blr import BLRConfig, compress
from hf_blr.checkpoint.files import pickled_tensors, weight_files
from hf_blr.checkpoint.folder import MANY, check_folder, check_notice


def saved(model, folder):
    compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_what_nobody_here_compressed_is_left_to_transformers(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"quantization_config": {"quant_method": "other"}}, {"num_hidden_layers": 10**9}, {}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        (tmp_path / "model.safetensors.index.json").write_text("[]")
        check_folder(tmp_path)
        check_notice({**config, **wrong}, tmp_path)
    shutil.rmtree(tmp_path)
    check_folder(tmp_path)


@pytest.mark.parametrize("method", ["other", None])
def test_who_reads_the_config_alone_is_told_as_well(method, tmp_path):
    config = saved(tiny_llama(), tmp_path)
    config["quantization_config"] = method and {**config["quantization_config"], "quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"compressed by hf_blr, but its quantization_config is of {method!r}"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_head_of_another_shape_is_named_and_made_anew_in_another_class(tmp_path):
    config = saved(tiny_bert(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": dict.fromkeys(range(5), "x")}))
    with pytest.raises(ValueError, match=r"classifier.bias: .*classifier.weight \(shape \(3, 64\), the config says"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    model = BertForTokenClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 5


def test_as_many_blocks_as_a_large_model_has_are_no_fault(tmp_path):
    config = saved(tiny_llama(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": MANY}))
    check_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {"n_layer": MANY + 1}}))
    with pytest.raises(ValueError, match=f"n_layer is {MANY + 1}, and the checkpoint's files have"):
        check_folder(tmp_path)


def test_files_that_are_no_weights_are_not_read_as_such(tmp_path):
    (tmp_path / "training_args.bin").write_text("x")
    assert weight_files(tmp_path) == []
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert weight_files(tmp_path) == [str(tmp_path / "pytorch_model.bin")]
    saved(tiny_llama(), tmp_path)
    assert weight_files(tmp_path) == [str(tmp_path / "model.safetensors")]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_headers_of_pytorchs_own_files(zipped, tmp_path):
    """Tensors that share their numbers, parts of others, transposed ones, and what is said beside them."""
    whole = torch.randn(4, 6)
    tensors = {"a": whole, "b": whole.t(), "c": whole[1:3], "d": torch.nn.Parameter(whole.bfloat16()), "e": whole.int()}
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert pickled_tensors(str(tmp_path / "x.bin")) == [(key, tuple(t.shape), t.dtype) for key, t in tensors.items()]


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:TypedStorage:UserWarning")
def test_a_quantised_tensor_of_pytorchs_own_is_named(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="a: in .*x.bin it is no tensor with all of its numbers"):
        pickled_tensors(str(tmp_path / "x.bin"))


def test_a_link_to_a_file_elsewhere_is_a_file(tmp_path):
    """As the hub's cache keeps them."""
    saved(model := tiny_llama(), tmp_path / "a")
    os.rename(tmp_path / "a" / "model.safetensors", tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "a" / "model.safetensors")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in load_file(tmp_path / "blob").items())
    assert loaded.keys() == model.state_dict().keys()
