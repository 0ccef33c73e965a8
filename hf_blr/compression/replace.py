"""One layer at a time: fitted, or taken from the journal, and put in the place of the dense one."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from hf_blr.calibration.problem import Problem
from hf_blr.compression.journal import Unkept
from hf_blr.compression.report import LayerReport
from hf_blr.config import BLRConfig
from hf_blr.dense import at_hand, bring_in, dense_weight, is_transposed, set_dense_weight, stored_bias, stored_weight
from hf_blr.factorize import factorize, relative_error
from hf_blr.linear import BLRLinear
from hf_blr.plan import LayerPlan


def replace_layer(
    model: nn.Module,
    name: str,
    layer: LayerPlan,
    problem: Problem,
    output_gram: Tensor | None,
    config: BLRConfig,
    journal: Unkept,
) -> LayerReport:
    """Fits one layer and puts the result in its place; reports the error of what is stored."""
    started = time.perf_counter()
    module, spec = model.get_submodule(name), layer.spec
    with at_hand(module):
        if (kept := journal.layer(name)) is not None:
            model.set_submodule(name, kept_layer(name, layer, kept[0], module))
            return LayerReport(name, spec, **kept[1])
        device = config.device_for(stored_weight(module))
        target = (dense_weight(module) if problem.target is None else problem.target).to(device)
        gram = None if problem.gram is None else problem.gram.to(device)
        options = config.fit_options(target.shape[1], problem.rows)
        try:
            factors = factorize(target, spec, gram, output_gram, options, layer.storage)
            replaced = BLRLinear.from_fit(spec, factors.tensors, module, layer.storage)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    rel_error = stored_error(replaced, target, gram)
    report = LayerReport(name, spec, rel_error, factors.rounds, time.perf_counter() - started)
    said = {"rel_error": rel_error, "rounds": report.rounds, "seconds": report.seconds}
    journal.keep_layer(name, replaced.stored(), said)
    model.set_submodule(name, replaced)
    return report


def kept_layer(name: str, layer: LayerPlan, tensors: dict[str, Tensor], module: nn.Module) -> BLRLinear:
    """What a journal kept of a layer, in the place of the dense one. Raises ValueError with its name if it is not."""
    weight = stored_weight(module)
    try:
        held = {key: value.to(weight.device) for key, value in tensors.items()}
        found = BLRLinear.from_factors(
            layer.spec, held, stored_bias(module), is_transposed(module), layer.storage, weight.dtype
        )
    except ValueError as error:
        raise ValueError(f"{name}: the journal holds another layer: {error}") from None
    return found.train(module.training)


def move_layer(model: nn.Module, name: str, problem: Problem, journal: Unkept) -> None:
    """Gives a layer that stays dense the weight that makes up for those compressed before it, if there is one."""
    module = model.get_submodule(name)
    if (kept := journal.layer(name)) is not None:
        bring_in(module)
        set_dense_weight(module, kept[0]["weight"])
    elif problem.target is not None:
        bring_in(module)
        set_dense_weight(module, problem.target)
        journal.keep_layer(name, {"weight": dense_weight(module)}, {})


@torch.no_grad()
def stored_error(module: BLRLinear, target: Tensor, gram: Tensor | None) -> float:
    """`relative_error` of the matrix that the module holds, multiplied out in float32, to the target `[N, K]`."""
    target = target.float()
    matrix = module.dense_weight(torch.float32).to(target)
    return relative_error(target, matrix, None if gram is None else gram.to(target))
