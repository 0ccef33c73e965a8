"""How calibration runs compute on a GPU: the models' forwards fast, the matrices gathered from them exactly."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hf_blr.ops import use_impl


@contextmanager
def calibrating(module: nn.Module):
    """Forwards of this module inside are calibration's.

    On a GPU, float32 models multiply in bfloat16 there (their residual stream stays float32), as models that come in
    bfloat16 do anyway; in float32, attention over grouped keys alone took more than half of a calibration run. Layers
    that are compressed already are multiplied out: that costs as much as a forward over as many tokens as their rank,
    and needs no kernel compiled for each of them.
    """
    parameter = next(module.parameters(), None)
    with ExitStack() as stack:
        if parameter is not None and parameter.is_cuda:
            stack.enter_context(use_impl("dense"))
            if parameter.dtype == torch.float32 and torch.cuda.is_bf16_supported():
                stack.enter_context(torch.autocast("cuda", torch.bfloat16))
        yield


def exact(tensor: torch.Tensor) -> torch.autocast:
    """A context in which autocast leaves float32 alone: sums over all tokens keep its digits."""
    return torch.autocast(tensor.device.type, enabled=False)
