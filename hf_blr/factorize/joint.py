"""All factors of one block refined together, by gradient steps towards what the dense block put out.

Each layer of a block has been fitted by itself, as a linear problem. What stands between them (attention, the MLP's
gate) lets the errors of one be undone by another, which only the whole block's output shows.

What counts as an error of the output is what the loss feels of it, as in the fits: steps towards its plain square undo
what the Fisher weighting of the fits gave (BLAST 4x16 of SmolLM2-135M at half: perplexity 29 -> 45).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_blr.factorize.metric import OutputMetric
from hf_blr.factorize.pairs import as_pairs
from hf_blr.linear import BLRLinear

#: Adam's, as a fraction of each factor's root mean square: factors of one layer may differ a lot in size
LEARNING_RATE = 3e-3
#: one batch of so many takes no step and decides whether the new factors stay
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class BlockReport:
    """One refined block: the mean squared error of its output, as `StreamError` counts it, before and after.

    On the batches that took no step, where there are at least two.
    """

    name: str
    error_before: float
    error_after: float


def refine_block(
    name: str,
    block: nn.Module,
    run: Callable[[Callable, Tensor], Tensor],
    entered: list[Tensor],
    wanted: list[Tensor],
    steps: int,
    seed: int = 0,
    stream_gram: Tensor | None = None,
) -> BlockReport | None:
    """Refines the factors of the block's compressed layers, in place; None if it has none.

    Works on float32 copies whatever the model's dtype, and puts the old factors back if the new ones are not better.

    Args:
        name: of the block, for the report.
        block: a decoder layer; none of its parameters gets a gradient.
        run: (block or a function in its place, hidden states `[B, T, hidden]`) -> hidden states that leave.
        entered: what the compressed model hands the block, batch by batch.
        wanted: what should leave it.
        steps: of Adam, each on one batch; the learning rate falls to zero along half a cosine.
        seed: of the order of the batches.
        stream_gram: what the loss feels of the block's output, as in `Statistics.stream_grams`; None weighs all of the
            stream's directions alike.
    """
    error = StreamError(stream_gram)
    with as_pairs(block):
        return refine_factors(name, block, run, entered, wanted, steps, seed, error)


def refine_factors(name, block, run, entered, wanted, steps, seed, error: StreamError) -> BlockReport | None:
    """`refine_block` of a block without pivoted layers."""
    factors = {
        f"{path}.{factor}": parameter
        for path, module in block.named_modules()
        if isinstance(module, BLRLinear)
        for factor, parameter in module.factors().items()
    }
    if not factors:
        return None
    # the last ones; a single batch has to do both
    taught = len(entered) - max(1, len(entered) // HELD_OUT_EVERY) if len(entered) > 1 else 1
    checked = slice(taught if len(entered) > 1 else 0, None)
    before = mean_error(block, run, entered[checked], wanted[checked], error)
    old = {key: parameter.detach().clone() for key, parameter in factors.items()}
    copies = {key: value.to(torch.float32, copy=True).requires_grad_(True) for key, value in old.items()}
    sizes = [{"params": [p], "lr": LEARNING_RATE * p.detach().square().mean().sqrt().item()} for p in copies.values()]
    optimizer = torch.optim.Adam(sizes, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    for i in order(taught, steps, seed):
        with torch.enable_grad():
            replaced = {key: value.to(factors[key].dtype) for key, value in copies.items()}
            out = run(lambda *args, r=replaced, **kwargs: functional_call(block, r, args, kwargs), entered[i])
            gradients = torch.autograd.grad(error(out, wanted[i]), list(copies.values()))
        for copy, gradient in zip(copies.values(), gradients, strict=True):
            copy.grad = gradient
        optimizer.step()
        schedule.step()
    put(factors, copies)
    after = mean_error(block, run, entered[checked], wanted[checked], error)
    if not after < before:
        put(factors, old)
        after = before
    return BlockReport(name, before, after)


def put(factors: dict[str, nn.Parameter], values: dict[str, Tensor]):
    with torch.no_grad():
        for key, parameter in factors.items():
            parameter.copy_(values[key])


def order(batches: int, steps: int, seed: int) -> list[int]:
    """Batch numbers, all of them in a random order before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(batches, generator=generator) for _ in range(-(-steps // batches))]
    return torch.cat(rounds)[:steps].tolist()


@torch.no_grad()
def mean_error(block, run, entered: list[Tensor], wanted: list[Tensor], error: StreamError) -> float:
    return sum(error(run(block, x), y).item() for x, y in zip(entered, wanted, strict=True)) / len(entered)


class StreamError:
    """Mean over tokens of d^T G d / |h|^2, for what leaves a block, the h `[..., hidden]` wanted, and d between them.

    A token's error over its own size, so that the few tokens on which a model stores its largest activations weigh like
    all others: what reads the stream normalises it.

    Args:
        stream_gram: G as diagonal blocks `[M, hidden / M, hidden / M]`, up to a factor; None is the identity.
    """

    def __init__(self, stream_gram: Tensor | None = None):
        self.root = None if stream_gram is None else OutputMetric(stream_gram, len(stream_gram)).root.float()

    def __call__(self, out: Tensor, wanted: Tensor) -> Tensor:
        out, wanted = (t.reshape(-1, t.shape[-1]).float() for t in (out, wanted))
        change = out - wanted
        if self.root is not None:
            blocks = change.view(len(change), len(self.root), -1).transpose(0, 1)
            change = (blocks @ self.root.to(change.device)).transpose(0, 1).flatten(1)
        return (change.square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()
