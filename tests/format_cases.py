"""Models and files in bits, for the tests of them."""

import json

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from hf_blr import BLRConfig
from hf_blr.structures import Blast, Dense, LowRank, Monarch, Pivoted

#: of every structure, small enough to round many times
SMALL_SPECS = [
    LowRank(48, 32, 16),
    Pivoted(48, 32, 16),
    Monarch(48, 32, 8, (2, 2)),
    Blast(48, 32, 16, (2, 2)),
    Dense(48, 32, 32),
]

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def streamed(model, folder, config):
    model.save_pretrained(folder / "dense")
    return type(model).from_pretrained(folder / "dense", blr_config=config)


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert set(first) == set(second)
    for key, value in first.items():
        other = second[key]
        assert value.dtype == other.dtype and torch.equal(value.view(torch.uint8), other.view(torch.uint8)), key


def checkpoint(root):
    """The folder of a checkpoint with rows of int3 that end inside a word, and fp8."""
    overrides = {"down_proj": {"structure": "dense"}}
    config = BLRConfig("low_rank", rank=20, factor_format="int3", dense_format="fp8", overrides=overrides)
    streamed(tiny_llama(), root, config).save_pretrained(root / "bits")
    return root / "bits"


def edited(folder, target, edit=None, edit_config=None):
    """A copy of a checkpoint folder with its tensors or its config changed."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if edit_config:
        edit_config(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def filled(key, place, value):
    def edit(tensors):
        tensors[key][place] = value

    return edit


def replaced(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})
