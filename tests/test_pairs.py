"""The assembler that makes numbers of words, on a small machine (`ptx.py`)."""

import pytest
import torch

pytest.importorskip("triton")
from ptx import KINDS, halves, machine  # noqa: E402

from hf_blr.formats import format_named  # noqa: E402
from hf_blr.formats.codes import Codes  # noqa: E402
from hf_blr.ops.triton import pairs  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_every_code_at_every_place(form, kind):
    storage = format_named(form)
    bits, dtype = storage.bits, KINDS[kind]
    codes = torch.arange(1 << bits)
    if form == "fp8":
        # two of its codes are no numbers
        codes = codes[codes & 127 != 127]
        values = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        values = (codes - (1 << bits - 1)).to(torch.int8)
    per, count = 32 // bits, len(codes)
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(j)) for j in range(2 * per)])
    # each row of two words has a code at each of their places
    rows = values.view(torch.int8)[order].T.reshape(2 * count, per).view(values.dtype)
    laid = storage.laid_out(Codes(rows, torch.ones(2 * count, 1, dtype=torch.bfloat16)))[storage.code_part]
    words = laid.view(torch.int32).long().view(count, 2) & 0xFFFFFFFF
    program = getattr(pairs, f"{'FLOAT8' if form == 'fp8' else form.upper()}_{'BF16' if kind == 'bf16x2' else 'FP16'}")
    wanted, operands = rows.double().view(count, 2, per), words.unbind(1)
    if form == "int4":
        # of every other row the second word's numbers come first
        changed = torch.arange(count) % 2 == 1
        wanted = torch.where(changed[:, None, None], wanted.flip(1), wanted)
        operands = (*operands, torch.where(changed, 0x1054, 0x5410))
    found = machine(program.value, *operands, outputs=per)
    for j in range(per):
        assert torch.equal(halves(found[j], dtype).double().T, wanted[:, :, j]), j
