"""Compressions that must end in the same bits, however they are run."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import batches_for, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5


def timeless(said):
    """A report without how long things took."""
    if isinstance(said, dict):
        return {key: timeless(value) for key, value in said.items() if "seconds" not in key}
    return [timeless(value) for value in said] if isinstance(said, list) else said


def same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def inputs(model):
    batches = batches_for(model)
    if model.config.is_encoder_decoder:
        return [{**batch, "decoder_input_ids": batch["input_ids"][:, :9]} for batch in batches]
    return batches


CASES = {
    "conv1d": (tiny_gpt2, {"structure": "blast", "fit_rounds": 3}),
    "refined": (tiny_llama, {"structure": "pivoted", "block_steps": 6}),
    "experts": (tiny_mixtral, {"structure": "low_rank"}),
    "one shot": (tiny_llama, {"structure": "monarch", "sequential": False, "fit_rounds": 3}),
    "two chains": (tiny_t5, {"structure": "low_rank"}),
    "bits": (tiny_gpt2, {"structure": "low_rank", "factor_format": "int8", "group_size": 16}),
    "turned": (tiny_llama, {"structure": "low_rank", "turned": True}),
    "whole pass": (tiny_llama, {"structure": "low_rank", "fisher": False}),
}


#: a model that lies on the disk as a whole
reads_disk = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13"), reason="this release reads no model that is all on the disk"
)

OPTIONS = ["--structure", "low_rank", "--ratio", "0.6", "--num-samples", "4", "--seqlen", "64", "--dataset", "builtin"]


class Killed(BaseException):
    """What no code of ours catches."""


def killed_at(monkeypatch, write, before=False):
    """From now on, the process dies with its `write`-th file of a layer or block, before or after that has its name."""
    rename, left = os.replace, [write]

    def dying(scratch, path):
        left[0] -= Path(path).parent.name in ("layers", "blocks")
        if left[0] == 0 and before:
            # what a killed process cannot take away stays
            os.link(scratch, f"{scratch}"[:-32] + 32 * "0")
            raise Killed
        rename(scratch, path)
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(os, "replace", dying)
