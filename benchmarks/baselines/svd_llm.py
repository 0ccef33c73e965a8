"""SVD-LLM with its closed-form update."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.config import BLRConfig
from hf_blr.dense import dense_weight
from hf_blr.factorize.gram import damped, solve_psd
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.linear import BLRLinear
from hf_blr.modes import evaluating
from hf_blr.plan import resolve_plan

#: of the Gram matrices, as a fraction of their mean diagonal: enough for their roots to exist
DAMPING = 1e-4


def svd_llm_updated(dense: nn.Module, ratio: float, statistics: Statistics, batches: list[Tensor]) -> nn.Module:
    """SVD-LLM (arXiv 2403.07378) with its closed-form update: whitened SVD, then u fitted anew, layer by layer.

    u minimises ||W X~ - u v X~|| for the activations X~ of the model compressed so far.
    """
    model = copy.deepcopy(dense)
    config = BLRConfig("low_rank", ratio=ratio)
    plan = resolve_plan(model, config)
    with evaluating(model), torch.no_grad():
        chain = SequentialChain.trace(model, list(plan), [{"input_ids": batch} for batch in batches])
        for group in chain.problems(DAMPING):
            for name, problem in group.items():
                weight = dense_weight(model.get_submodule(name)).float()
                _, v = low_rank_factors(weight, plan[name].spec.rank, damped(statistics.grams[name], DAMPING))
                image = v @ damped(problem.gram, DAMPING)
                u = solve_psd((image @ v.mT).double(), (image @ weight.mT).double()).mT.float()
                model.set_submodule(
                    name, BLRLinear.from_fit(plan[name].spec, {"u": u, "v": v}, model.get_submodule(name))
                )
    return model
