"""The time of the experts of one tensor, of which tokens choose some."""

from __future__ import annotations

from hf_blr.formats import Format
from hf_blr.roofline.devices import Peaks
from hf_blr.roofline.stages import stages, stored_stages
from hf_blr.structures import BLRSpec


def predict_experts(
    spec: BLRSpec, storage: Format, pairs: float, experts: int, device: Peaks, dense: bool = False
) -> float:
    """Seconds of one forward of a tensor of experts in 16 bits: each stage is one kernel for all that are chosen.

    Experts are taken to be chosen alike and independently, so that E (1 - (1 - 1 / E)^pairs) of them are read, each
    for as many rows. Moving rows to their experts and back is left out: it is the same for all structures.

    Args:
        spec: the sizes of one expert.
        storage: the format of the factors.
        pairs: of a token and one of its experts.
        experts: E.
        dense: count the matrices that the factors stand for.
    """
    chosen = experts * (1 - (1 - 1 / experts) ** pairs)
    rows = max(round(pairs / chosen), 1)
    if dense:
        kernels = stages(spec, rows, form="dense", chip=device.chip)
    else:
        kernels = stored_stages(spec, storage, rows, device, alone=False)
    return sum(stage.times(chosen).seconds(device) for stage in kernels)
