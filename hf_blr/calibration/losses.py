"""A loss whose gradients show what a model's predictions feel: labels drawn from them, or directions of its features.

For logits of several classes, labels are drawn from the model's own predictions, so that the mean of g g^T over the
gradients g is the Fisher matrix. A model without such logits (an encoder, a head of one number) is weighed by the
squared error of its features f instead: a random direction r of unit variance in each number is drawn for each
position, and the loss is r^T f. The mean of g g^T is then J^T J, with J the derivative of f by the layer's output: the
Gauss-Newton matrix of half the squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch, run
from hf_blr.calibration.padding import has_decoder, predicted_positions

#: endings of names under which models put out one vector for each sequence or image, to be compared with others
EMBEDDED = ("_embeds", "_embedding", "embeddings")

#: logits of the place where an answer starts and ends, one for each position
SPANS = ("start_logits", "end_logits")


#: rows of logits of which labels are drawn at a time
ROWS = 256


class NoLoss(ValueError):
    """The model has no loss that its layers could be weighed by."""


def sampled_loss(model: nn.Module, batch: Batch, seed: int) -> tuple[Tensor, int]:
    """The summed loss of what is drawn for the model's outputs, and over how many positions.

    Positions that a mask hides draw nothing. What is drawn for a sequence depends on its own seed and the number of its
    positions alone, so that padding and the other sequences of a batch change nothing.

    Args:
        seed: of the batch's first sequence; the next ones have the next numbers.

    Raises:
        NoLoss: if the model puts out no numbers.
    """
    # a decoder of its own is fed from the labels; elsewhere they would only cost a loss
    given = {key: value for key, value in batch.items() if key != "labels" or has_decoder(model)}
    output = run(model, given)
    mask = predicted_positions(batch, model)
    losses, counts = [], []
    for key, values in predicted(model, output).items():
        drawn_loss = kind_of_loss(model, key, values)
        rows = [positions_of(key, each, None if mask is None else mask[i]) for i, each in enumerate(values)]
        # drawn on the CPU's generator, so that every device sees the same up to rounding
        losses += [drawn_loss(each.float(), torch.Generator().manual_seed(seed + i)) for i, each in enumerate(rows)]
        counts.append(sum(len(each) for each in rows))
    return torch.stack(losses).sum(), max(counts)


def predicted(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """{name: what a model puts out that its users read}: logits, else features, else all numbers."""
    if torch.is_tensor(output):
        return {"features": output}
    if isinstance(output, tuple):
        output = {str(i): value for i, value in enumerate(output)}
    items = output.items() if hasattr(output, "items") else vars(output).items()
    numbers = {
        key: value for key, value in items if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1
    }
    for chosen in (
        [key for key in numbers if key == "logits"],
        [key for key in numbers if key in SPANS],
        [key for key in numbers if key.endswith(EMBEDDED)],
        [key for key in numbers if key == "last_hidden_state"],
        list(numbers),
    ):
        if chosen:
            return {key: numbers[key] for key in chosen}
    raise NoLoss(
        f'{type(model).__name__} puts out no numbers to weigh its layers by; set fisher=False and allocation="uniform"'
    )


def positions_of(key: str, values: Tensor, mask: Tensor | None) -> Tensor:
    """`[..., C]` of one sequence -> one row for each position that counts, `[rows, C]`."""
    if mask is not None and len(values) == len(mask) and (values.dim() > 1 or key in SPANS):
        values = values[mask.to(values.device)]
    return values.reshape(-1, values.shape[-1])


def kind_of_loss(model: nn.Module, key: str, values: Tensor) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What is drawn for these outputs: one class, any number of labels, or a direction."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if key == "logits" and kind == "multi_label_classification":
        return any_labels
    return (
        one_class if key in SPANS or (key == "logits" and values.shape[-1] > 1 and kind != "regression") else projected
    )


def one_class(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of a class drawn for each row of `[rows, classes]`, summed."""
    threshold = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    with torch.no_grad():
        # by parts: over a large vocabulary each step holds as much as all logits. In float64, since a GPU sums up one
        # long row in any order
        parts = zip(logits.split(ROWS), threshold.split(ROWS), strict=True)
        drawn = [(part.softmax(-1).cumsum(-1, dtype=torch.float64) < point).sum(-1) for part, point in parts]
        labels = torch.cat(drawn).clamp_max(logits.shape[-1] - 1)
    return F.cross_entropy(logits, labels, reduction="sum")


def any_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Binary cross entropy of labels `[rows, classes]`, each drawn alone, summed."""
    threshold = torch.rand(logits.shape, generator=generator).to(logits.device)
    labels = (threshold < logits.detach().sigmoid()).float()
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def projected(features: Tensor, generator: torch.Generator) -> Tensor:
    """The product of features `[rows, C]` with a random direction for each row, summed."""
    return (features * torch.randn(features.shape, generator=generator).to(features.device)).sum()
