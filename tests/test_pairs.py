"""The assembler that makes numbers of words, run by a small machine of its own on the CPU."""

import re

import pytest
import torch

pytest.importorskip("triton")
from hf_blr.formats import format_named  # noqa: E402
from hf_blr.formats.codes import Codes  # noqa: E402
from hf_blr.ops.triton import pairs  # noqa: E402

KINDS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def machine(program, words):
    """What is in the outputs after a program whose last two operands are these words; PTX, ISA 8."""
    outputs = max(int(n) for n in re.findall(r"\$(\d+)", program)) - 1
    held = {f"${outputs}": words[0], f"${outputs + 1}": words[1]}

    def value(name):
        return torch.full_like(words[0], int(name, 0)) if name[0].isdigit() else held[name]

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", program).split(";")[:-1]:
        name, _, rest = line.strip().partition(" ")
        target, *operands = (operand.strip() for operand in rest.split(","))
        a, *others = (value(operand) for operand in operands)
        held[target] = OPERATIONS[name](a, *others) if name in OPERATIONS else multiplied(name, a, *others)
    return [held[f"${j}"] for j in range(outputs)]


def permuted(a, b, selector):
    both = a | b << 32
    picked = [(both >> 8 * (selector >> 4 * i & 7)) & 0xFF for i in range(4)]
    return sum(byte << 8 * i for i, byte in enumerate(picked))


def logic(a, b, c, table):
    """Bit by bit, as its table says of 0xF0 for a, 0xCC for b and 0xAA for c."""
    cases = (((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) for i in range(32))
    return sum((table >> case & 1) << i for i, case in enumerate(cases))


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": permuted,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": logic,
}


def multiplied(name, *factors):
    """a * b + c of both halves, of `fma.rn.kind`."""
    dtype = KINDS[name.removeprefix("fma.rn.")]
    a, b, c = (halves(t, dtype).double() for t in factors)
    low, high = (a * b + c).to(dtype).view(torch.int16).long() & 0xFFFF
    return low | high << 16


def halves(words, dtype):
    """`[2, n]` numbers: the low and the high half of each word."""
    return torch.stack([words & 0xFFFF, words >> 16]).to(torch.int32).to(torch.int16).view(dtype)


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
    found = machine(program.value, words.unbind(1))
    wanted = rows.double().view(count, 2, per)
    for j in range(per):
        assert torch.equal(halves(found[j], dtype).double().T, wanted[:, :, j]), j
