"""AA-SVD: low-rank layers that aim at the dense model's outputs, and blocks that are trained to."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from hf_blr.calibration.aim import Aim
from hf_blr.calibration.calls import Call
from hf_blr.calibration.joint import order
from hf_blr.calibration.precision import tf32
from hf_blr.calibration.regression import Regression
from hf_blr.calibration.residual import counted
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.config import BLRConfig
from hf_blr.factorize.gram import damped
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.linear import BLRLinear
from hf_blr.modes import evaluating
from hf_blr.plan import resolve_plan

#: of the Gram matrices, as a fraction of their mean diagonal: enough for their roots to exist
DAMPING = 1e-4
LEARNING_RATE = 1e-4


class DenseAim(Aim):
    """What leaves the block in the dense model."""

    def wanted(self, entered: list[Tensor], left: list[Tensor]) -> list[Tensor]:
        return [counted(y, positions) for y, positions in zip(left, self.real, strict=True)]


class Anchored(Regression):
    """The matrix that gives W X on X~, without any share left out and without the stream's errors."""

    def add(self, x: Tensor, reached: Tensor, real: Tensor | None = None, gap: Tensor | None = None) -> None:
        super().add(x, reached, real)


class AnchoredChain(SequentialChain):
    """What the layers and blocks of the compressed model get is its own; what they aim at is the dense model's."""

    def aim(self, block: nn.Module, calls: list[Call], real: list[Tensor | None]) -> Aim:
        return DenseAim(self, block, calls, real)

    def regression(self, writes: bool) -> Regression:
        return Anchored(1.0)


def aa_svd(dense: nn.Module, ratio: float, batches: list[Tensor], seed: int, passes: int) -> nn.Module:
    """AA-SVD (arXiv 2604.02119), in a copy: every layer keeps the same share.

    The factors of a layer minimise ||W X - u v X~|| over the dense model's inputs X and those X~ of the model
    compressed so far. Then all parameters of a block are trained so that it gives on its own input what the dense block
    gives on the dense model's.

    Args:
        dense: a chain of blocks, in float32.
        ratio: of the parameters of the targets to keep.
        batches: token ids `[B, T]`.
        seed: of the order of the batches.
        passes: over the batches, for each block, 25 in the authors' code; 0 leaves the closed form.
    """
    model = copy.deepcopy(dense)
    config = BLRConfig("low_rank", ratio=ratio)
    plan = resolve_plan(model, config)
    refine = partial(train_block, steps=passes * len(batches), seed=seed) if passes else None
    with evaluating(model), torch.no_grad():
        chain = AnchoredChain.trace(model, list(plan), [{"input_ids": batch} for batch in batches])
        for group in chain.problems(DAMPING, refine):
            for name, problem in group.items():
                spec = plan[name].spec
                u, v = low_rank_factors(problem.target, spec.rank, damped(problem.gram, DAMPING))
                model.set_submodule(name, BLRLinear.from_fit(spec, {"u": u, "v": v}, model.get_submodule(name)))
    return model


def train_block(
    name: str, block: nn.Module, aim: Aim, entered: list[Tensor], wanted: list[Tensor], steps: int, seed: int
) -> None:
    """AdamW on the mean squared error of the block's outputs, on all of its parameters.

    The learning rate rises over a tenth of the steps and falls to a tenth along a cosine, as the authors' code has it.
    """
    parameters = list(block.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, steps // 10, steps, min_lr_rate=0.1)
    block.requires_grad_(True)
    for i in order(len(entered), steps, seed):
        with torch.enable_grad():
            loss = nn.functional.mse_loss(aim.run(block, entered[i], i), wanted[i])
        with tf32():
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
