"""What a denoiser reads in the steps of a pipeline, as calibration batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch, hooked


def denoising_batches(pipeline: Any, calls: Iterable[dict[str, Any]], component: str = "transformer") -> list[Batch]:
    """Run a pipeline of diffusers, and keep what each of its steps hands to the denoiser.

    Args:
        pipeline: dense, on the device where it runs best.
        calls: keyword arguments of the pipeline, one dict a call (`prompt`, `num_inference_steps`, ...). Steps late in
            the schedule read other latents than early ones, so a call should take as many as its users' calls do.
        component: the attribute that holds the denoiser, such as "unet".

    Returns:
        One batch a step, on the CPU, for `compress(pipeline.transformer, config, calibration=batches)`.

    Raises:
        ValueError: if the pipeline has no such component, or the calls never ran it.
    """
    denoiser = getattr(pipeline, component, None)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(f"{type(pipeline).__name__} has no module {component!r}; name the one that denoises")
    names = inspect.signature(denoiser.forward)
    batches: list[Batch] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = names.bind(*args, **kwargs).arguments
        # copied, since pipelines write into their tensors; what is no number is left to its default
        batches.append({key: value.to("cpu", copy=True) for key, value in given.items() if isinstance(value, Tensor)})

    with torch.no_grad(), hooked([denoiser.register_forward_pre_hook(keep, with_kwargs=True)]):
        for call in calls:
            pipeline(**call)
    if not batches:
        raise ValueError(f"no call ran {component} of {type(pipeline).__name__}; give at least one, of a step or more")
    return batches
