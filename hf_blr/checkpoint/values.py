"""The numbers of a loaded model: those that no training writes are refused."""

from __future__ import annotations

from torch import nn

from hf_blr.checkpoint.verify import describe
from hf_blr.formats.values import fault, is_finite
from hf_blr.linear import blr_modules


def check_values(model: nn.Module) -> None:
    """Look at every number that a BLR checkpoint brought; what is offloaded waits on disk and is not read.

    Raises:
        ValueError: naming the tensors that are not finite, and indices that are no permutation.
    """
    wrong: dict[str, str] = {}
    for owner, module in blr_modules(model).items():
        kinds = module.storage.stored(module.spec)
        found = {f"{owner}.{name}": fault(kinds[name].kind, value) for name, value in module.stored().items()}
        wrong |= {name: problem for name, problem in found.items() if problem is not None}
    for name, parameter in model.named_parameters():
        if name not in wrong and parameter.is_floating_point() and not parameter.is_meta and not is_finite(parameter):
            wrong[name] = "expected finite numbers, got NaN or infinity"
    if wrong:
        raise ValueError(
            f"{next(iter(wrong))}: the checkpoint is damaged. "
            + describe("Wrong numbers", [f"{name} ({problem})" for name, problem in wrong.items()])
            + "Save or fetch it again"
        )
