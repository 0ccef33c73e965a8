"""One layer: fitted, taken from the journal or got from another process, and put in the place of the dense one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_blr.calibration.problem import Problem
from hf_blr.compression.journal import Unkept
from hf_blr.compression.report import LayerReport
from hf_blr.compression.shapes import fit_cost
from hf_blr.config import BLRConfig
from hf_blr.dense import at_hand, bring_in, dense_weight, is_transposed, set_dense_weight, stored_bias, stored_weight
from hf_blr.factorize import factorize, relative_error
from hf_blr.linear import BLRLinear
from hf_blr.plan import LayerPlan
from hf_blr.processes import Processes

#: a layer in its new form, and what is said of the fit
Fitted = tuple[BLRLinear, LayerReport]


def fit_group(
    model: nn.Module,
    plan: Mapping[str, LayerPlan],
    problems: Mapping[str, Problem],
    output_gram: Callable[[str], Tensor | None],
    config: BLRConfig,
    journal: Unkept,
    processes: Processes,
) -> Iterator[tuple[str, Fitted]]:
    """(name, the layer that takes its place) of each planned layer among `problems`, whose fits hang on no other.

    Each is fitted by one of the processes, which all get it.

    Args:
        output_gram: gives the blocks of G of a layer whose outputs are weighed.
    """
    names = [name for name in problems if name in plan]
    owners = dict(zip(names, processes.owners([fit_cost(plan[name].spec) for name in names]), strict=True))

    def fit(name: str) -> Fitted:
        return fit_layer(model, name, plan[name], problems[name], output_gram(name), config, journal)

    # one by one where one process does all: nothing then waits for its place in memory
    own = {name: fit(name) for name in names if processes.count > 1 and owners[name] == processes.rank}
    for name in names:
        if processes.count == 1:
            yield name, fit(name)
        else:
            yield name, sent(model, name, plan[name], own.pop(name, None), owners[name], processes)


def sent(
    model: nn.Module, name: str, layer: LayerPlan, fitted: Fitted | None, owner: int, processes: Processes
) -> Fitted:
    """What its owner has fitted, in each process."""
    module = model.get_submodule(name)
    with at_hand(module):
        weight = stored_weight(module)
        tensors = (
            fitted[0].stored()
            if fitted is not None
            else {
                key: torch.empty(shape, dtype=layer.storage.dtype_of(kind, weight.dtype), device=weight.device)
                for key, (shape, kind) in layer.storage.stored(layer.spec).items()
            }
        )
        for tensor in tensors.values():
            processes.send(tensor, owner)
        report = processes.gathered(None if fitted is None else fitted[1])[owner]
        return fitted or (placed_layer(layer, tensors, module), report)


def fit_layer(
    model: nn.Module,
    name: str,
    layer: LayerPlan,
    problem: Problem,
    output_gram: Tensor | None,
    config: BLRConfig,
    journal: Unkept,
) -> Fitted:
    """One layer, fitted or taken from the journal; the report has the error of what is stored."""
    started = time.perf_counter()
    module, spec = model.get_submodule(name), layer.spec
    with at_hand(module):
        if (kept := journal.layer(name)) is not None:
            try:
                return placed_layer(layer, kept[0], module), LayerReport(name, spec, **kept[1])
            except ValueError as error:
                raise ValueError(f"{name}: the journal holds another layer: {error}") from None
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
    return replaced, report


def placed_layer(layer: LayerPlan, tensors: Mapping[str, Tensor], module: nn.Module) -> BLRLinear:
    """The layer of these stored tensors, to take the place of a dense one. Raises ValueError if they are of another."""
    weight = stored_weight(module)
    held = {key: value.to(weight.device) for key, value in tensors.items()}
    found = BLRLinear.from_factors(
        layer.spec, held, stored_bias(module), is_transposed(module), layer.storage, weight.dtype
    )
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
