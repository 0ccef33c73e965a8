"""All factors of one block refined together, by gradient steps towards an output that the caller names.

Each layer of a block has been fitted by itself, as a linear problem. What stands between them (attention, the MLP's
gate) lets the errors of one be undone by another, which only the whole block's output shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_blr.calibration.aim import Aim
from hf_blr.calibration.muon import Muon
from hf_blr.calibration.precision import tf32
from hf_blr.calibration.stand_ins import with_stand_ins
from hf_blr.calibration.training_form import SCALES, forms_in, training_form
from hf_blr.linear import blr_modules

#: as a fraction of each factor's root mean square, since factors of one layer may differ a lot in size: of factors
#: that are matrices, and of those that multiply elementwise. Scales of bits take the second one: they train as
#: logarithms, whose steps are relative as they are
MATRIX_RATE, LEARNING_RATE = 1.2e-2, 3e-3

#: of so many batches or more the last is not trained on, and judges what the others made
JUDGED_FROM = 8


@dataclass(frozen=True)
class BlockReport:
    """One refined block: the mean relative squared error of its output's tokens before and after.

    On a batch that the steps leave out, where there are eight batches or more.
    """

    name: str
    error_before: float
    error_after: float


def refine_block(
    name: str,
    block: nn.Module,
    aim: Aim,
    entered: Sequence[Tensor],
    wanted: Sequence[Tensor],
    steps: int,
    seed: int = 0,
) -> BlockReport | None:
    """Refines the factors of the block's compressed layers, in place; None if it has none.

    Of factors in bits the scales train and the codes stay.

    The loss is the squared error of each token's output over the squared size of what is wanted, so that the few tokens
    on which a model stores its largest activations weigh like all others: what reads the stream normalises it. Works on
    float32 copies whatever the model's dtype, and puts the old factors back if the new ones are not better, on a batch
    that the steps leave out if there are eight or more.

    Args:
        name: of the block, for the report.
        block: a decoder layer; none of its parameters gets a gradient.
        aim: runs it, in its state at any time.
        entered: what the compressed model hands the block, batch by batch.
        wanted: what should leave it.
        steps: of Muon, and of Adam for what is no matrix, each on one batch; their rates fall to zero along half a
            cosine.
        seed: of the order of the batches.
    """
    with with_stand_ins(block), training_form(block, SCALES):
        return refine_factors(name, block, aim, entered, wanted, steps, seed)


def refine_factors(
    name: str,
    block: nn.Module,
    aim: Aim,
    entered: Sequence[Tensor],
    wanted: Sequence[Tensor],
    steps: int,
    seed: int,
) -> BlockReport | None:
    """`refine_block` of a block whose layers are in the form that trains."""
    factors = {
        f"{path}.{factor}": parameter
        for path, module in blr_modules(block).items()
        for factor, parameter in module.factors().items()
    }
    scales = {f"{name}.log_scale": form.log_scale for name, form in forms_in(block).items()}
    factors |= scales
    if not factors:
        return None
    batches = len(entered)
    judged = range(batches - 1 if batches >= JUDGED_FROM else 0, batches)
    before = mean_error(block, aim, entered, wanted, judged)
    old = {key: parameter.detach().clone() for key, parameter in factors.items()}
    copies = {key: value.to(torch.float32, copy=True).requires_grad_(True) for key, value in old.items()}
    sizes = {key: 1.0 if key in scales else p.detach().square().mean().sqrt().item() for key, p in copies.items()}
    matrices = matrix_factors(block)
    optimizer = Muon(
        [{"params": [p], "lr": MATRIX_RATE * sizes[key]} for key, p in copies.items() if key in matrices],
        [{"params": [p], "lr": LEARNING_RATE * sizes[key]} for key, p in copies.items() if key not in matrices],
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    for i in order(judged.start or batches, steps, seed):
        with torch.enable_grad(), in_bfloat16(entered[i].device):
            replaced = {key: value.to(factors[key].dtype) for key, value in copies.items()}
            out = aim.run(lambda *args, r=replaced, **kwargs: functional_call(block, r, args, kwargs), entered[i], i)
            optimizer.zero_grad()
            with tf32():
                # lays gradients as their factors lie, which fused steps ask for
                error(out, wanted[i]).backward(inputs=list(copies.values()))
        optimizer.step()
        schedule.step()
    put(factors, copies)
    after = mean_error(block, aim, entered, wanted, judged)
    if not after < before:
        put(factors, old)
        after = before
    return BlockReport(name, before, after)


def matrix_factors(root: nn.Module) -> set[str]:
    """The names of the factors below `root` that multiply as matrices."""
    layers = blr_modules(root).items()
    return {
        f"{path}.{name}" for path, layer in layers for name in layer.factors() if name not in layer.spec.elementwise
    }


def in_bfloat16(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Products of steps on a GPU in bfloat16: what that rounds is small beside what a step moves."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast("cuda", torch.bfloat16) if fast else nullcontext()


def put(factors: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in factors.items():
            parameter.copy_(values[key])


def order(batches: int, steps: int, seed: int) -> list[int]:
    """Batch numbers, all of them in a random order before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(batches, generator=generator) for _ in range(-(-steps // batches))]
    return torch.cat(rounds)[:steps].tolist()


@torch.no_grad()
def mean_error(block: nn.Module, aim: Aim, entered: Sequence[Tensor], wanted: Sequence[Tensor], judged: range) -> float:
    """Over the tokens of some batches."""
    tokens = [wanted[i].shape[:-1].numel() for i in judged]
    errors = [error(aim.run(block, entered[i], i), wanted[i]).item() for i in judged]
    return sum(count * each for count, each in zip(tokens, errors, strict=True)) / sum(tokens)


def error(out: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |out - wanted|^2 / |wanted|^2."""
    out, wanted = out.float(), wanted.float()
    return ((out - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()
