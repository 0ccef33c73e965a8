"""What fits in bits run on a GPU, compiled before the first of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_blr.factorize.columns import BLOCK, round_columns, runs_kernel
from hf_blr.formats import Bits, Codes
from hf_blr.ops.compiling import side_by_side

#: numbers of a row that 256 divides, and that it does not: kernels read them in other steps
LENGTHS = 16 * BLOCK, 3 * BLOCK


@torch.no_grad()
def compile_rounding(formats: Iterable[Bits], device: torch.device) -> None:
    """Compiles, side by side, the kernels that round to these formats and give numbers back; none on a CPU."""
    together = side_by_side() if runs_kernel(torch.empty(1, 1, device=device)) else None
    if together is None:
        return
    columns, upper = torch.zeros(1, BLOCK, device=device), torch.eye(BLOCK, device=device)
    with together:
        for storage in formats:
            grouped = storage.group_size is not None and storage.group_size <= BLOCK
            round_columns(columns, upper, storage, None if grouped else columns.new_ones(1, 1))
            for length in LENGTHS:
                if length % (storage.group_size or 1):
                    continue
                shape = 1, length
                scale = columns.new_ones(storage.scale_shape(shape), dtype=torch.bfloat16)
                codes = storage.rounded(columns.new_zeros(shape), scale)
                storage.numbers(storage.laid_out(Codes(codes.values, scale)), shape, torch.float32)
