"""Choosing one option for each layer under one budget, and the loss that an option is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_blr.factorize.gram import cholesky, damped
from hf_blr.factorize.metric import OutputMetric
from hf_blr.formats import PLAIN, Format
from hf_blr.structures import BLRSpec, structure_named

#: powers of ten between which the price of a second lies, in the largest difference of loss for all of the time
PRICES = 6.0


@dataclass(frozen=True)
class Option:
    """One thing that a layer can become: a spec, or None for staying dense, at a cost, with its predicted loss.

    storage: the format of its factors, where that is chosen too. seconds: predicted, where time has a budget too.
    """

    spec: BLRSpec | None
    cost: float
    loss: float
    storage: Format = PLAIN
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether it keeps the whole matrix."""
        return self.spec is None or structure_named(self.spec.structure).whole

    @property
    def kind(self) -> tuple[str, ...]:
        """Structure, blocks and format, without the rank."""
        if self.spec is None:
            return ("dense", self.storage.name)
        blocks = "{}x{}".format(*self.spec.num_blocks)
        return (self.spec.structure, *([blocks] if self.spec.blocked else []), self.storage.name)


@dataclass(frozen=True)
class Choice:
    """Why a layer became what it is.

    taken: structure, blocks and format. bits: stored for each number of the dense matrix. loss: predicted, in nats a
    token, of experts for all of their tensor. runner_up, runner_up_loss: the option of another structure, blocks or
    format that stores no more bits and has the least loss of those; None if there is none. hopeless: {structure and
    blocks that a first fit of a layer of the kind left no chance: its loss over low-rank's at equal parameters}.
    """

    taken: str
    bits: float
    loss: float
    runner_up: str | None
    runner_up_loss: float | None
    hopeless: dict[str, float] = field(default_factory=dict)


def allocate(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """{layer: the option taken}: the smallest total loss found whose total cost is at most `budget`.

    Lagrange's multiplier by bisection, so only options on each layer's lower convex hull of (cost, loss) are seen;
    what is then left of the budget goes to the steps that lower the loss most for their cost.

    Raises:
        ValueError: if even the cheapest options cost more than the budget.
    """
    costs = padded([[option.cost for option in layer] for layer in options.values()], 0.0)
    losses = padded([[option.loss for option in layer] for layer in options.values()], math.inf)
    least = sum(min(option.cost for option in layer) for layer in options.values())
    if least > budget:
        raise ValueError(f"the budget is {budget:.4g}, the smallest options cost {least:.4g} together")

    # a price sees each option once: threads would wait for each other longer than one takes for all of them
    of_loss, of_cost = losses.numpy(), costs.numpy()

    def take(price: float) -> Tensor:
        return torch.from_numpy((of_loss + price * of_cost).argmin(1))

    def total(taken: Tensor) -> float:
        return sum(costs.gather(1, taken.unsqueeze(1)).flatten().tolist())

    # at a price of 0 nothing is too dear; at the highest, every layer takes its cheapest option
    there = losses < math.inf
    spread = max((loss[own].max() - loss[own].min()).item() for loss, own in zip(losses, there, strict=True))
    steps = costs.diff().abs()[there[:, 1:]]
    step = steps[steps > 0].min().item() if (steps > 0).any() else 1.0
    low, high = 0.0, 2 * spread / step + 1e-300
    if total(take(low)) <= budget:
        high = low
    for _ in range(100):
        middle = (low + high) / 2
        if total(take(middle)) <= budget:
            high = middle
        else:
            low = middle
    taken = take(high)
    taken = spend_rest(taken, costs, losses, budget - total(taken))
    return {name: options[name][i] for name, i in zip(options, taken.tolist(), strict=True)}


def padded(rows: list[list[float]], value: float) -> Tensor:
    """Rows of any lengths in one matrix, float64, this value behind their ends."""
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def spend_rest(taken: Tensor, costs: Tensor, losses: Tensor, rest: float) -> Tensor:
    """Moves layers to dearer options, best loss for its cost first, while any fits into the rest.

    Args:
        taken: the option of each layer `[layers]`.
        costs, losses: `[layers, options]`; the loss of what is no option is infinite.
    """
    taken = taken.clone()
    while True:
        own = taken.unsqueeze(1)
        more, better = costs - costs.gather(1, own), losses.gather(1, own) - losses
        rate = torch.where((more > 0) & (more <= rest), better / more.clamp_min(1e-300), 0)
        if not rate.max() > 0:
            return taken
        layer, option = divmod(int(rate.argmax()), rate.shape[1])
        rest -= more[layer, option].item()
        taken[layer] = option


def allocate_both(options: dict[str, list[Option]], budget: float, seconds: float) -> dict[str, Option] | None:
    """The plan of the least loss found within a budget of cost and one of seconds; None if none was found.

    A price of a second, by bisection, is added to the losses that `allocate` sees.
    """
    losses = [option.loss for layer in options.values() for option in layer]
    unit = (max(losses) - min(losses) + 1e-30) / seconds
    low, high = -PRICES, PRICES
    best = None
    for _ in range(30):
        price = unit * 10 ** ((low + high) / 2)
        priced = {
            name: [replace(option, loss=option.loss + price * option.seconds) for option in layer]
            for name, layer in options.items()
        }
        taken = allocate(priced, budget)
        plan = {name: options[name][priced[name].index(option)] for name, option in taken.items()}
        fits = within(plan, budget, seconds)
        low, high = (low, (low + high) / 2) if fits else ((low + high) / 2, high)
        if fits and (best is None or loss_of(plan) < loss_of(best)):
            best = plan
    return best


def within(plan: dict[str, Option], budget: float, seconds: float) -> bool:
    costs, times = [option.cost for option in plan.values()], [option.seconds for option in plan.values()]
    return sum(costs) <= budget and sum(times) <= seconds


def loss_of(plan: dict[str, Option]) -> float:
    return sum(option.loss for option in plan.values())


def choice_of(taken: Option, options: list[Option], numbers: int, hopeless: dict[str, float] | None = None) -> Choice:
    """Why this one of the options of a layer of so many dense numbers; `hopeless` as in `Choice`."""
    others = [option for option in options if option.kind != taken.kind and option.cost <= taken.cost]
    second = min(others, key=lambda option: option.loss, default=None)
    return Choice(
        " ".join(taken.kind),
        taken.cost / numbers,
        taken.loss,
        None if second is None else " ".join(second.kind),
        None if second is None else second.loss,
        hopeless or {},
    )


def loss_curve(weight: Tensor, gram: Tensor, output_gram: Tensor, pairs: int, damping: float) -> Tensor:
    """Predicted rise of the loss, in nats a token, for the best low-rank matrix of each rank: `[min(N, K) + 1]`.

    Half the squared singular values of G^1/2 W H^1/2 beyond the rank, over S T; see `calibration/fisher.py`.
    """
    metric = OutputMetric(output_gram, len(output_gram))
    scale = output_gram.double().diagonal(dim1=-2, dim2=-1).mean()
    image = metric.whiten(weight.double()) @ cholesky(damped(gram, damping).double())
    square = image @ image.mT if image.shape[0] <= image.shape[1] else image.mT @ image
    # on the CPU, since a GPU sums up one long row in any order
    energy = (torch.linalg.eigvalsh(square).clamp_min(0) * scale / (2 * pairs)).cpu()
    # eigenvalues rise: the sum of the smallest, for every number of kept ones
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)]).flip(0)


def predicted_loss(change: Tensor, gram: Tensor, output_gram: Tensor, pairs: int) -> float:
    """Predicted rise of the loss, in nats a token, for W' = W + change `[N, K]`; see `calibration/fisher.py`."""
    blocks, size, _ = output_gram.shape
    image = (output_gram @ change.view(blocks, size, -1)).view(change.shape)
    return (image.double() * (change @ gram).double()).sum().item() / (2 * pairs)


def interpolate(curve: Sequence[float], rank: float) -> float:
    """The curve between two ranks; zero beyond its end."""
    low = int(rank)
    if low + 1 >= len(curve):
        return 0.0
    here, next_one = curve[low : low + 2]
    return here + (rank - low) * (next_one - here)
