"""Inputs for the models of the zoo: samples of different lengths, batches in which they are padded, and the truth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_models import IMAGE, KINDS, PAD

Sample = dict[str, Tensor]

#: tokens of each sample; Longformer itself pads to a whole number of its windows
LENGTHS = (12, 5, 9, 12, 3, 8)
WHOLE_WINDOWS = (12, 4, 8, 12, 4, 8)


def samples(name: str, count: int = 6, times: int = 1) -> list[Sample]:
    """One input after the other, each a batch of one without padding or mask, and `times` the usual length."""
    generator = torch.Generator().manual_seed(0)
    lengths = WHOLE_WINDOWS if name == "longformer" else LENGTHS
    if KINDS[name] == "images and text":
        # what these are given as text is short
        times = 1
    return [sample(name, times * lengths[i % len(lengths)], times * 15, generator) for i in range(count)]


def sample(name: str, length: int, both: int, generator: torch.Generator) -> Sample:
    """One of them; `both` is what source and target have in length together."""

    def ids(size: int) -> Tensor:
        return torch.randint(3, 250, (1, size), generator=generator)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    kind = KINDS[name]
    if kind == "text":
        return {"input_ids": ids(length)}
    if kind == "text to text":
        return {"input_ids": ids(length), "labels": ids(both - length)}
    if kind == "audio to text":
        return {"input_features": numbers(1, 8, 64), "labels": ids(length)}
    if kind == "audio":
        return {"input_values": numbers(1, 16 * length)}
    if kind == "latents":
        return {"hidden_states": numbers(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    images = numbers(1, 3, 16, 16)
    if kind == "images":
        return {"pixel_values": images}
    if kind == "images and text":
        return {"input_ids": ids(length), "pixel_values": images}
    marked = torch.cat([ids(1), torch.full((1, 4), IMAGE), ids(length)], 1)
    if name == "llava":
        return {"input_ids": marked, "pixel_values": images}
    start, end = torch.tensor([[253]]), torch.tensor([[252]])
    marked = torch.cat([start, marked[:, 1:5], end, marked[:, 5:]], 1)
    return {
        "input_ids": marked,
        "pixel_values": numbers(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (marked == IMAGE).long(),
    }


def padded_batches(name: str, parts: list[Sample], sizes: tuple[int, ...]) -> list[Sample]:
    """The samples in batches of these sizes, padded on the right, with masks; labels are padded by -100."""
    batches, start = [], 0
    for size in sizes:
        batches.append(padded(parts[start : start + size]))
        start += size
    return batches


def padded(parts: list[Sample]) -> Sample:
    batch = {key: joined(key, [part[key] for part in parts]) for key in parts[0]}
    for key in ("input_ids", "input_values"):
        if key in batch:
            lengths = torch.tensor([[part[key].shape[1]] for part in parts])
            batch["attention_mask"] = (torch.arange(batch[key].shape[1]) < lengths).long()
    return batch


def joined(key: str, values: list[Tensor]) -> Tensor:
    """Tensors of one row each, or of many for one sample, one below the other."""
    fill = {"input_ids": PAD, "labels": -100}.get(key, 0)
    longest = max(value.shape[-1] for value in values)
    return torch.cat([nn.functional.pad(value, (0, longest - value.shape[-1]), value=fill) for value in values])


def plain_grams(model: nn.Module, names: list[str], parts: list[Sample]) -> dict[str, Tensor]:
    """{layer: X^T X in float64} by a plain hook on each layer, one sample at a time, without padding or mask."""
    found: dict[str, Tensor] = {}

    def count(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        found[name] = found.get(name, 0) + rows.T @ rows

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: count(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        for part in parts:
            model(**part)
    for handle in handles:
        handle.remove()
    return found
