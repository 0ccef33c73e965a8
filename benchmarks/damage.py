"""Checkpoints and configs that must not load: kinds of damage, drawn at random, and what a refusal must name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_blr import BLRConfig, compress
from hf_blr.config import option_fields
from hf_blr.structures import FACTOR, INDEX, structures

#: one block; a load takes milliseconds
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
#: values of types that no field of a plan takes
WRONG_VALUES = (None, "6", 6.5, -1, 0, [8], {}, "x", 10**9)


@dataclass
class Checkpoint:
    """A checkpoint in memory, on its way to files: its config and the tensors of each file."""

    config: dict
    files: dict[str, dict[str, Tensor]]
    #: what is left of a file, by its name: {file: number of bytes}
    cut: dict[str, int]
    #: what becomes of the folder once all is written
    edits: list[Callable[[Path], None]] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return next(iter(self.files.values()))

    @property
    def blr(self) -> dict:
        return self.config["quantization_config"]

    def write(self, folder: Path) -> None:
        """In the layout that `save_pretrained` leaves."""
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, tensors in self.files.items():
            if name.endswith(".bin"):
                torch.save(tensors, folder / name)
            else:
                save_file(tensors, folder / name, metadata={"format": "pt"})
        for name, size in self.cut.items():
            (folder / name).write_bytes((folder / name).read_bytes()[:size])
        if len(self.files) > 1:
            places = {key: name for name, tensors in self.files.items() for key in tensors}
            index = {"metadata": {}, "weight_map": places}
            (folder / f"{shard_name(1).split('-')[0]}.safetensors.index.json").write_text(json.dumps(index))
        for edit in self.edits:
            edit(folder)


def shard_name(number: int) -> str:
    return f"model-{number:05d}-of-00002.safetensors"


def whole(structure: str, sizes: dict[str, int] = SIZES, **settings: object) -> Checkpoint:
    """An undamaged checkpoint of a tiny model; settings are those of its config."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **HEADS, architectures=["LlamaForCausalLM"])).bfloat16()
    blocks = 2 if structures()[structure].spec.blocked else None
    config = BLRConfig(structure, ratio=0.6, num_blocks=blocks, fit_rounds=2, **settings)
    compress(model, config, progress=False)
    config = json.loads(model.config.to_json_string(use_diff=False))
    return Checkpoint(config, {"model.safetensors": model.state_dict()}, {})


#: damages a checkpoint in place, and returns names of which a clear refusal has one
Damage = Callable[[Checkpoint, Random], list[str]]


def damaged(checkpoint: Checkpoint, damage: Damage, rng: Random) -> tuple[Checkpoint, list[str]]:
    """A damaged copy, and names of which a clear refusal has one."""
    new = Checkpoint(copy.deepcopy(checkpoint.config), {"model.safetensors": dict(checkpoint.tensors)}, {})
    # some in PyTorch's own file format
    if rng.random() < 0.3:
        new.files = {"pytorch_model.bin": new.tensors}
    return new, damage(new, rng)


def of_kind(checkpoint: Checkpoint, kind: str, rng: Random) -> str:
    """A random tensor of a layer that is of this kind: factor or index."""
    records, found = structures(), []
    for name, layer in checkpoint.blr["layers"].items():
        found += [f"{name}.{leaf}" for leaf in records[layer["structure"]].spec.names(kind)]
    return rng.choice(found)


def changed(checkpoint: Checkpoint, key: str, change: Callable[[Tensor], Tensor]) -> list[str]:
    checkpoint.tensors[key] = change(checkpoint.tensors[key].clone())
    return [key]


def missing(checkpoint: Checkpoint, rng: Random) -> list[str]:
    key = rng.choice(sorted(checkpoint.tensors))
    del checkpoint.tensors[key]
    return [key]


def misshapen(checkpoint: Checkpoint, rng: Random) -> list[str]:
    key, size = of_kind(checkpoint, FACTOR, rng), rng.randint(1, 3)
    return changed(checkpoint, key, lambda t: torch.cat([t, t[:size]]) if rng.random() < 0.5 else t.flatten())


def wrong_dtype(checkpoint: Checkpoint, rng: Random) -> list[str]:
    dtype = rng.choice([torch.int32, torch.int64, torch.uint8, torch.bool])
    return changed(checkpoint, of_kind(checkpoint, FACTOR, rng), lambda t: t.to(dtype))


def not_finite(checkpoint: Checkpoint, rng: Random) -> list[str]:
    key = rng.choice(sorted(k for k, t in checkpoint.tensors.items() if t.is_floating_point() and t.numel()))

    def spoil(tensor: Tensor) -> Tensor:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
        return tensor

    return changed(checkpoint, key, spoil)


def index_twice(checkpoint: Checkpoint, rng: Random) -> list[str]:
    def spoil(order: Tensor) -> Tensor:
        a, b = rng.sample(range(len(order)), 2)
        order[a] = order[b]
        return order

    return changed(checkpoint, of_kind(checkpoint, INDEX, rng), spoil)


def index_outside(checkpoint: Checkpoint, rng: Random) -> list[str]:
    def spoil(order: Tensor) -> Tensor:
        order[rng.randrange(len(order))] = rng.choice([-1, len(order), 2**31 - 1, -(2**31)])
        return order

    return changed(checkpoint, of_kind(checkpoint, INDEX, rng), spoil)


def index_of_floats(checkpoint: Checkpoint, rng: Random) -> list[str]:
    return changed(checkpoint, of_kind(checkpoint, INDEX, rng), lambda t: t.float() + rng.random() / 2)


def extra_tensor(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name = rng.choice(sorted(checkpoint.blr["layers"]))
    leaf = rng.choice(["weight", "bias", "scale"])
    checkpoint.tensors[f"{name}.{leaf}"] = torch.zeros(2)
    return [f"{name}.{leaf}"]


def two_shards(checkpoint: Checkpoint, rng: Random) -> list[str]:
    keys = sorted(checkpoint.tensors)
    middle, twice, tensors = rng.randrange(2, len(keys) - 1), rng.choice(keys), checkpoint.tensors
    # each file has one tensor that is in no other, or the index would not list it
    first, second = ({key: tensors[key] for key in part} for part in (keys[:middle], keys[middle:]))
    (second if twice in first else first)[twice] = tensors[twice].clone()
    checkpoint.files = {shard_name(1): first, shard_name(2): second}
    return [twice]


def cut_short(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name = next(iter(checkpoint.files))
    checkpoint.cut[name] = rng.choice([0, 1, 7, 100, rng.randrange(200, 4000)])
    return [name]


def plan_entry(checkpoint: Checkpoint, rng: Random) -> tuple[str, dict]:
    name = rng.choice(sorted(checkpoint.blr["layers"]))
    return name, checkpoint.blr["layers"][name]


def plan_value(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name, layer = plan_entry(checkpoint, rng)
    key = rng.choice(sorted(layer))
    layer[key] = rng.choice(WRONG_VALUES)
    return [name]


def plan_flag(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name, layer = plan_entry(checkpoint, rng)
    key = rng.choice(["bias", "transposed"])
    layer[key] = not layer[key]
    return [name]


def plan_size(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name, layer = plan_entry(checkpoint, rng)
    key = rng.choice(["in_features", "out_features", "rank"])
    layer[key] = rng.choice([layer[key] + 1, 2 * layer[key], 10**9])
    return [name]


def plan_key(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name, layer = plan_entry(checkpoint, rng)
    if rng.random() < 0.5:
        layer["extra"] = 1
    else:
        del layer[rng.choice(sorted(layer))]
    return [name]


def plan_name(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """A module is listed under another name, so that its factors belong to nobody."""
    name, layer = plan_entry(checkpoint, rng)
    del checkpoint.blr["layers"][name]
    if rng.random() < 0.5:
        checkpoint.blr["layers"]["elsewhere." + name] = layer
    return [name]


def plan_crowd(checkpoint: Checkpoint, rng: Random) -> list[str]:
    name, layer = plan_entry(checkpoint, rng)
    crowd = {f"{rng.choice('abc')}.{i}": layer for i in range(rng.choice([100, 1000]))}
    checkpoint.blr["layers"] = {**crowd, name: layer} if rng.random() < 0.5 else crowd
    return [next(iter(checkpoint.blr["layers"]))]


def config_field(checkpoint: Checkpoint, rng: Random) -> list[str]:
    values = (*WRONG_VALUES, -(10**9))
    wrong = [(f.name, v) for f in option_fields() for v in values if f.metadata["check"](v) is not None]
    name, checkpoint.blr[name] = rng.choice(wrong)
    return [name]


def config_key(checkpoint: Checkpoint, rng: Random) -> list[str]:
    key = "".join(rng.choices("abcdefgh", k=6))
    checkpoint.blr[key] = 1
    return [key]


def config_version(checkpoint: Checkpoint, rng: Random) -> list[str]:
    checkpoint.blr["version"] = rng.choice([2, 10**6, "1", 1.5, None])
    return ["version"]


def model_size(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """The config is that of a model of another size."""
    key = rng.choice(["hidden_size", "intermediate_size"])
    checkpoint.config[key] *= 2
    return sorted(checkpoint.blr["layers"])


KINDS: dict[str, Damage] = {
    "a tensor is missing": missing,
    "a factor has another shape": misshapen,
    "a factor of integers": wrong_dtype,
    "NaN or infinity": not_finite,
    "an index twice": index_twice,
    "an index out of range": index_outside,
    "an index of floats": index_of_floats,
    "a tensor too many": extra_tensor,
    "a tensor in two files": two_shards,
    "a file cut short": cut_short,
    "plan: a value of a wrong type": plan_value,
    "plan: a flag flipped": plan_flag,
    "plan: another size": plan_size,
    "plan: a key too few or too many": plan_key,
    "plan: a module under another name": plan_name,
    "plan: many unknown modules": plan_crowd,
    "config: a field of a wrong type": config_field,
    "config: an unknown key": config_key,
    "config: another version": config_version,
    "config: another model's sizes": model_size,
}
#: kinds that need indices, which one structure has
OF_INDICES = ("an index twice", "an index out of range", "an index of floats")
