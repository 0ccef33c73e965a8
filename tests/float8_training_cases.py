"""A layer that multiplies in float8 while it trains, and what it is trained on."""

import torch

from hf_blr.linear import BLRLinear
from hf_blr.structures import structure_named

#: in features, out features, rank
K, N, R = 256, 192, 64


def layer(structure="low_rank", dtype=torch.float32):
    torch.manual_seed(0)
    module = BLRLinear.from_spec(structure_named(structure).spec(K, N, R, (1, 1)), bias=True, dtype=dtype)
    module.float8 = True
    return module.train()


def numbers(tokens, spread=0.0):
    """x and the gradient of the output, of tokens that differ in size by e to the power of `spread`."""
    made = torch.Generator().manual_seed(1)
    sizes = (torch.randn(2, tokens, 1, generator=made) * spread).exp()
    return torch.randn(tokens, K, generator=made) * sizes[0], torch.randn(tokens, N, generator=made) * sizes[1]
