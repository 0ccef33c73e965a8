"""Damage to the files around the tensors: headers, indices, pickles, configs, and what is no file at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from damage import Checkpoint, Damage, changed, plan_entry, shard_name
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
#: of a tiny Llama, besides its layers
DENSE = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")


def in_safetensors(checkpoint: Checkpoint) -> str:
    checkpoint.files = {"model.safetensors": checkpoint.tensors}
    return "model.safetensors"


def in_shards(checkpoint: Checkpoint) -> None:
    keys = sorted(checkpoint.tensors)
    parts = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    tensors = checkpoint.tensors
    checkpoint.files = {shard_name(i): {key: tensors[key] for key in part} for i, part in enumerate(parts, 1)}


def rewritten(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes a JSON file of a folder; what is no text then is written as JSON."""

    def edit(folder: Path) -> None:
        new = change(json.loads((folder / name).read_text()))
        (folder / name).write_text(new if isinstance(new, str) else json.dumps(new))

    return edit


def header(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """The head of a safetensors file says what cannot be."""
    name = in_safetensors(checkpoint)
    tensor = rng.choice(sorted(checkpoint.tensors))
    wrong: dict[str, Any] = {"shape": rng.choice([[-1, 4], [1 << 62, 1 << 62], [0.5]]), "dtype": "F7"}
    wrong["data_offsets"] = rng.choice([[8, 0], [0, 1 << 60], [-8, 0]])
    key = rng.choice([*wrong, "length", "nests", "bytes"])

    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        about, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
        if key in wrong:
            about[tensor][key] = wrong[key]
        said = json.dumps(about)
        if key == "nests":
            said = said[:-1] + ', "x": ' + "[" * 10_000 + "]" * 10_000 + "}"
        encoded = b"\xff" * 8 if key == "bytes" else said.encode()
        length = rng.choice([1 << 40, 1 << 63]) if key == "length" else len(encoded)
        (folder / name).write_bytes(struct.pack("<Q", length) + encoded + rest)

    checkpoint.edits.append(edit)
    return [name]


def index(checkpoint: Checkpoint, rng: Random) -> list[str]:
    in_shards(checkpoint)

    def spoil(about: dict[str, Any]) -> Any:
        places = about["weight_map"]
        key = rng.choice(sorted(places))
        gone = rng.choice(sorted(about))
        lost = {name: value for name, value in about.items() if name != gone}
        wrong = [{**about, "weight_map": value} for value in ([1], None, {}, "x", {**places, key: 7})]
        return rng.choice([lost, *wrong, "{", "[" * 10_000, [], {**about, "metadata": []}])

    checkpoint.edits.append(rewritten(INDEX_FILE, spoil))
    return [INDEX_FILE]


def elsewhere(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """The index sends the reader to a file that is not beside it."""
    in_shards(checkpoint)
    away = rng.choice(["../{}", "/{}", "./{}", "a/../{}", "//{}"])

    def spoil(about: dict[str, Any]) -> Any:
        places = {
            key: away.format(file) if file == shard_name(2) else file for key, file in about["weight_map"].items()
        }
        return {**about, "weight_map": places}

    checkpoint.edits.append(rewritten(INDEX_FILE, spoil))
    return [INDEX_FILE]


def no_file(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """A folder, a pipe that nobody writes to, or a device without an end, where the weights should be."""
    name = in_safetensors(checkpoint)
    make = rng.choice([Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    checkpoint.edits.append(edit)
    return [name]


def no_tensors(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """A file in PyTorch's format that holds something else, or tensors without their numbers."""
    name, tensors = "pytorch_model.bin", dict(checkpoint.tensors)
    key = rng.choice(sorted(key for key, tensor in tensors.items() if tensor.is_floating_point()))
    wrong: list[Any] = [
        tensors[key].tolist(),
        tensors[key].float().to_sparse(),
        tensors[key].to("meta"),
        tensors[key].flatten()[:1].expand(10**12),
    ]
    held = [list(tensors.items()), tensors[key], {**tensors, 3: tensors[key]}, "x"]
    checkpoint.files = {name: rng.choice([*held, *({**tensors, key: value} for value in wrong)])}
    if rng.random() < 0.1:
        checkpoint.edits.append(lambda folder: (folder / name).write_text("these are no weights"))
    return [name]


def two_names(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """A tensor beside itself, under the name that it has in the base model, with other numbers."""
    key = rng.choice(sorted(key for key in checkpoint.tensors if key.startswith("model.")))
    twin = key.removeprefix("model.")
    checkpoint.tensors[twin] = checkpoint.tensors[key].clone().zero_()
    return [key, twin]


def dense_dtype(checkpoint: Checkpoint, rng: Random) -> list[str]:
    dtype = rng.choice([torch.int64, torch.int32, torch.uint8, torch.bool])
    return changed(checkpoint, rng.choice(DENSE), lambda tensor: tensor.to(dtype))


def dense_shape(checkpoint: Checkpoint, rng: Random) -> list[str]:
    def spoil(tensor: Tensor) -> Tensor:
        return rng.choice([tensor[:-1].clone(), torch.cat([tensor, tensor]), tensor[None].clone()])

    return changed(checkpoint, rng.choice(DENSE), spoil)


def unreadable(checkpoint: Checkpoint, rng: Random) -> list[str]:
    deep = "[" * 10_000 + "]" * 10_000
    value = rng.choice([deep, "1" * 5000])
    if rng.random() < 0.5:
        checkpoint.edits.append(rewritten("config.json", lambda about: json.dumps(about)[:-1] + f', "x": {value}}}'))
    else:
        said = rewritten("config.json", lambda about: json.dumps(about).replace('"rank": ', f'"rank": {value}, "x": '))
        checkpoint.edits.append(said)
    return ["config.json"]


def another_method(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """The plan is that of another package, or of none, so that transformers would read no factor."""
    if rng.random() < 0.3:
        del checkpoint.config["quantization_config"]
    elif rng.random() < 0.3:
        checkpoint.blr[rng.choice(["load_in_4bit", "load_in_8bit"])] = rng.choice([True, False])
    else:
        wrong = ["bitsandbytes", "fp8", "compressed-tensors", "HF_BLR", "hf_blr\u200b", "hf\u005fblr ", 3, None, []]
        checkpoint.blr["quant_method"] = rng.choice(wrong)
    return ["quant_method"]


def many_blocks(checkpoint: Checkpoint, rng: Random) -> list[str]:
    checkpoint.config["num_hidden_layers"] = rng.choice([2000, 10**7, 10**18])
    return ["num_hidden_layers"]


def no_dtype(checkpoint: Checkpoint, rng: Random) -> list[str]:
    key = rng.choice(["dtype", "torch_dtype"])
    checkpoint.config[key] = rng.choice(["load", "bf16", "", "nn", "__name__", "os.system"])
    return [key]


def plan_format(checkpoint: Checkpoint, rng: Random) -> list[str]:
    """What a plan says of bits is of a wrong type or of another format; of a checkpoint without any as well."""
    name, layer = plan_entry(checkpoint, rng)
    formats: tuple[Any, ...] = ("int5", "INT4", "fp8 ", "\u0456nt4", None, [], {}, 4, True, "int3")
    sizes: tuple[Any, ...] = (True, -64, 0, 10**18, 3.0, "4", [], {})
    key = rng.choice(["format", "group_size", "experts"])
    counts = (True, -1, 10**12, None, 1.0, 2)
    layer[key] = rng.choice({"format": formats, "group_size": sizes, "experts": counts}[key])
    return [name]


KINDS_OF_FILES: dict[str, Damage] = {
    "a tensor under two names": two_names,
    "a head, embedding or norm of integers": dense_dtype,
    "a head, embedding or norm of another shape": dense_shape,
    "a header that cannot be": header,
    "a file of something else": no_tensors,
    "no file": no_file,
    "an index that cannot be": index,
    "an index of files elsewhere": elsewhere,
    "plan: a format, group or expert that cannot be": plan_format,
    "config: nests too deep, or too long a number": unreadable,
    "config: another method": another_method,
    "config: far too many blocks": many_blocks,
    "config: no dtype": no_dtype,
}
#: which no repository can hold, or which are large
NOT_KEPT = ("no file",)
