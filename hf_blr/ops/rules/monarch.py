"""The route of a Monarch layer: which kernels run, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.few_tokens import runs_decode_kernels, stacks
from hf_blr.ops.rules.swap import reads_swapped


@dataclass(frozen=True)
class MonarchRoute:
    """What runs.

    Args:
        few: the kernels for few tokens.
        stacked: of these, the first stage is a stack of products.
        in_place: at many tokens, the last stage reads y with the block indices swapped.
        copied: at many tokens, y is copied in order first. With one input block there is nothing to swap.
    """

    few: bool
    stacked: bool
    in_place: bool
    copied: bool


def monarch_route(
    tokens: int,
    blocks: tuple[int, int],
    sizes: tuple[int, int, int],
    device: Device,
    adds: bool = False,
    keep: bool = False,
    layers: int = 1,
) -> MonarchRoute:
    """The route of one layer, or of one of several that run together; arguments as in `blast_route`."""
    (b1, b2), (p, q, r) = blocks, sizes
    few = runs_decode_kernels(tokens, b1, b2) and not keep
    stacked = few and stacks(tokens, b1, layers * b2 * r, p, device)
    in_place = not few and b1 > 1 and reads_swapped(b1, layers * b2, q, r, tokens, adds)
    return MonarchRoute(few, stacked, in_place, copied=not few and b1 > 1 and not in_place)
