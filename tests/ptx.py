"""A small machine on the CPU for the assembler inside kernels, which Triton's interpreter cannot run: PTX, ISA 8.

A register is a tensor of numbers from 0 to 2^32 - 1, or of float32.
"""

import re

import torch

KINDS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def machine(program, *operands, outputs=1):
    """What a program leaves in its first `outputs` operands, of which the others are given."""
    held = {f"${outputs + i}": operand for i, operand in enumerate(operands)}

    def value(name):
        return torch.full_like(operands[0], int(name, 0)) if name[0].isdigit() else held[name]

    for line in re.sub(r"\.reg[^;]*;", "", program.strip()[1:-1]).split(";")[:-1]:
        name, _, rest = line.strip().partition(" ")
        if rest.startswith("{"):
            low, high, source = re.match(r"\{(\w+), (\w+)\}, (\S+)", rest).groups()
            held[low], held[high] = value(source) & 0xFFFF, value(source) >> 16
            continue
        target, *sources = (operand.strip() for operand in rest.split(","))
        operation, _, kind = name.rpartition(".")
        arguments = [value(source) for source in sources]
        held[target] = OPERATIONS[name](*arguments) if name in OPERATIONS else in_halves(operation, kind, arguments)
    return [held[f"${j}"] for j in range(outputs)]


def permuted(a, b, selector):
    both = a | b << 32
    picked = [(both >> 8 * (selector >> 4 * i & 7)) & 0xFF for i in range(4)]
    return sum(byte << 8 * i for i, byte in enumerate(picked))


def logic(a, b, c, table):
    """Bit by bit, as its table says of 0xF0 for a, 0xCC for b and 0xAA for c."""
    cases = (((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) for i in range(32))
    return sum((table >> case & 1) << i for i, case in enumerate(cases))


def of_float8(pair):
    """Two of float16 from two bytes of e4m3."""
    return joined(torch.stack([pair & 0xFF, pair >> 8]).to(torch.uint8).view(torch.float8_e4m3fn).half())


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": permuted,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b & 0xFFFFFFFF,
    "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
    "lop3.b32": logic,
    "cvt.rn.f16x2.e4m3x2": of_float8,
    "cvt.rn.f16x2.f32": lambda high, low: joined(torch.stack([low, high]).half()),
    "cvt.f32.f16": lambda a: halves(a, torch.float16)[0].float(),
    "add.rn.f32": lambda a, b: a + b,
}
ARITHMETIC = {"fma.rn": lambda a, b, c: a * b + c, "add.rn": lambda a, b: a + b, "mul.rn": lambda a, b: a * b}


def in_halves(operation, kind, arguments):
    """An operation on both halves, rounded once."""
    dtype = KINDS[kind]
    return joined(ARITHMETIC[operation](*(halves(t, dtype).double() for t in arguments)).to(dtype))


def halves(words, dtype):
    """`[2, n]` numbers: the low and the high half of each word."""
    return torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF]).to(torch.int32).to(torch.int16).view(dtype)


def joined(numbers):
    """Words of `[2, n]` numbers of 16 bits."""
    low, high = numbers.view(torch.int16).long() & 0xFFFF
    return low | high << 16
