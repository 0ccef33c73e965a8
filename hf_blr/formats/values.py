"""What the numbers of a stored tensor may be: a right shape with wrong numbers loads as a wrong model."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.formats.plain import Format
from hf_blr.structures import FACTOR, INDEX, SCALE, BLRSpec

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def fault(kind: str, value: Tensor) -> str | None:
    """What is wrong with the numbers of a tensor of this kind, in words; None if nothing is, or it holds none (meta).

    Factors and scales are finite floating-point numbers. Indices are integers, each of 0 to their number less one once.
    """
    wrong = fault_of_dtype(kind, value.dtype)
    if wrong is not None or value.is_meta:
        return wrong
    if kind == INDEX:
        # of experts a row each
        rows = torch.atleast_1d(value).long()
        wanted = torch.arange(rows.shape[-1], device=value.device).expand(rows.shape)
        if not torch.equal(rows.sort(-1).values, wanted):
            return f"expected each integer of 0 to {rows.shape[-1] - 1} once, got others or some twice"
    elif kind in (FACTOR, SCALE) and not is_finite(value):
        return "expected finite numbers, got NaN or infinity"
    return None


def fault_of_dtype(kind: str, dtype: torch.dtype) -> str | None:
    """What is wrong with the dtype alone, which a file's header tells."""
    if kind == INDEX and dtype not in INTEGERS:
        return f"expected integers, got {dtype}"
    if kind in (FACTOR, SCALE) and not dtype.is_floating_point:
        return f"expected floating-point numbers, got {dtype}"
    return None


def check_fit(spec: BLRSpec, storage: Format, stored: dict[str, Tensor]) -> None:
    """Raises ValueError if a fit's stored tensors hold numbers that no layer may: they were too large for the dtype."""
    for name, (_, kind) in storage.stored(spec).items():
        problem = fault(kind, stored[name])
        if problem is not None:
            raise ValueError(
                f"the fit's {name} cannot be stored as {stored[name].dtype}: {problem}; load the model in a wider "
                "dtype, or leave this module dense with modules_to_not_convert"
            )


def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite; of a sharded tensor, of the part at hand."""
    local = getattr(value, "to_local", lambda: value)()
    if not local.numel():
        return True
    # PyTorch has little arithmetic in eight bits
    extremes = torch.aminmax(local.float() if local.element_size() == 1 else local)
    # one pass, and no mask as large as the tensor
    return bool(torch.isfinite(torch.stack(extremes)).all())
