"""Where parameters lie in memory, as far as it shows in results."""

from __future__ import annotations

from torch import nn

#: bytes; what torch's own CPU allocator gives
ALIGNMENT = 64


def align(model: nn.Module) -> None:
    """Move CPU parameters to aligned addresses, one at a time and without breaking ties.

    A tensor that is mapped from a safetensors file starts wherever the file's header ends. Matrix products on a CPU
    take another path there and round differently, so that a loaded model's logits would differ from the saved one's in
    the last digits although every number is the same.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
