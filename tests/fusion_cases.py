"""Compressed models for the tests of `fuse`."""

from tiny import tiny_llama

import hf_blr
from hf_blr.config import BLRConfig

CONFIGS = {
    "low_rank": {"structure": "low_rank", "rank": 8},
    "monarch": {"structure": "monarch", "rank": 2, "num_blocks": (4, 4)},
    "blast": {"structure": "blast", "rank": 8, "num_blocks": (4, 4)},
}


def compressed(structure="blast", build=tiny_llama):
    model = build()
    hf_blr.compress(model, BLRConfig(**CONFIGS[structure]))
    return model
