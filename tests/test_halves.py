"""The assembler that multiplies words by float16, on a small machine (`ptx.py`), and what prepares x for it."""

import pytest
import torch

pytest.importorskip("triton")
from ptx import joined, machine  # noqa: E402

from hf_blr.formats import format_named  # noqa: E402
from hf_blr.formats.codes import Codes  # noqa: E402
from hf_blr.ops.triton import halves  # noqa: E402

#: {form: its format, largest number, exponent of x}
FORMS = {"int4": ("int4", 8, halves.TOP_INT4), "int8": ("int8", 128, halves.TOP_INT8)}
FORMS |= {form: ("fp8", 448, halves.TOP_FP8) for form in ("fp8", "fp8_bits")}


def words_and_numbers(storage, count, words):
    """(words `[count, words]`, their numbers `[count, words, n]`), all codes among them."""
    shape = count * words, 32 // storage.bits
    if storage.name == "fp8":
        codes = torch.arange(shape[0] * shape[1]).remainder(256)
        values = torch.where(codes & 127 == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)
        values = values[torch.randperm(values.numel())].view(shape)
    else:
        half = 1 << storage.bits - 1
        values = torch.randint(-half, half, shape).to(torch.int8)
    laid = storage.laid_out(Codes(values, torch.ones(shape[0], 1, dtype=torch.bfloat16)))[storage.code_part]
    held = laid.view(torch.int32).long().view(count, words) & 0xFFFFFFFF
    return held, values.double().view(count, words, -1)


def pairs_of(x, form):
    """Words of two numbers of x `[count, words, n]` of float16, in the order in which the program takes them."""
    per = x.shape[2]
    order = [(j, j + 4) for j in range(4)] if form == "int4" else [(j, j + 1) for j in range(0, per, 2)]
    return [joined(torch.stack([x[:, i, a], x[:, i, b]])) for i in range(x.shape[1]) for a, b in order]


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_products(form, words):
    torch.manual_seed(0)
    name, _, top = FORMS[form]
    held, numbers = words_and_numbers(format_named(name), 4096, words)
    x = (torch.randn(4096, words, numbers.shape[2]) * 2.0 ** (top.value - 3)).half()
    (found,) = machine(halves.sum_program(form, words), *held.unbind(1), *pairs_of(x, form))
    wanted = (numbers * x.double()).sum((1, 2))
    # a few roundings of float16, of 2^-11 each at most
    assert (found - wanted).norm() <= 2**-10 * wanted.norm()


def test_a_pair_of_x():
    x, y = torch.randn(2, 1000) * 100
    (found,) = machine(halves.PAIR.value, x, y)
    assert torch.equal(found, joined(torch.stack([x, y]).half()))


@pytest.mark.parametrize("form", FORMS)
def test_no_sum_overflows(form):
    _, largest, top = FORMS[form]
    of_a_half = 2 * halves.PRODUCTS[form][1]
    assert of_a_half * largest * 2.0 ** (top.value + 1) < torch.finfo(torch.float16).max
