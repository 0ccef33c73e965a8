"""Numbers in few bits: packing, scales, rounding, and what a format refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_blr.formats import FORMATS, PLAIN, Codes, format_named, words
from hf_blr.structures import Blast, Dense, LowRank, Monarch, Pivoted

INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
BITS = [*INTEGERS, "fp8"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 99))
def test_codes_survive_their_words(bits, count, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (*lead, count), generator=generator, dtype=torch.int8)
    packed = words.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (*lead, -(-count * bits // 32))
    assert torch.equal(words.unpack(packed, bits, count), codes)
    assert words.leftover_is_zero(packed, bits, count)


def test_the_layout_of_words():
    # from the lowest bit of the first word on, each code raised by half of the range
    assert words.pack(torch.tensor([-8, -7, 7], dtype=torch.int8), 4).tolist() == [0xF10]
    assert words.pack(torch.full((8,), 7, dtype=torch.int8), 4).tolist() == [-1]
    # the eleventh number of three bits begins with the two highest bits of the first word
    three = torch.full((11,), -4, dtype=torch.int8)
    three[10] = 3
    assert words.pack(three, 3).tolist() == [-(1 << 30), 1]
    assert not words.leftover_is_zero(torch.tensor([[0, 2]], dtype=torch.int32), 3, 11)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("group_size", [None, 16])
def test_a_grid_is_met_exactly(name, group_size):
    storage = format_named(name, group_size)
    highest = (1 << INTEGERS[name] - 1) - 1
    codes = normal(2, 5, 32).mul(highest).round().clamp(-highest - 1, highest)
    # the largest code stands in each group, so that the scale is the one that clips nothing
    codes[..., ::16] = highest
    scale = 2.0 ** torch.arange(-3, 7).view(2, 5, 1)
    factor = codes * scale
    found = storage.nearest(factor)
    assert torch.equal(found.values, codes.to(torch.int8))
    assert torch.equal(found.numbers(torch.float32), factor)
    assert found.scale.dtype == torch.bfloat16 and found.scale.shape == (2, 5, 1 if group_size is None else 2)


@pytest.mark.parametrize("name, limit", [("int8", 0.01), ("int4", 0.11), ("int3", 0.21), ("int2", 0.40), ("fp8", 0.03)])
def test_scales_clip_where_that_pays(name, limit):
    factor = normal(16, 4096)
    error = (format_named(name).nearest(factor).numbers(torch.float32) - factor).norm() / factor.norm()
    assert error < limit


@pytest.mark.parametrize("name", INTEGERS)
def test_smaller_groups_come_closer(name):
    # rows whose first half is a hundred times larger
    factor = normal(8, 128) * torch.cat([torch.full((64,), 100.0), torch.ones(64)])
    errors = [
        (format_named(name, size).nearest(factor).numbers(torch.float32) - factor)[:, 64:].norm() for size in (None, 64)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", BITS)
def test_zeros_and_extremes(name):
    storage = format_named(name)
    factor = torch.zeros(4, 32)
    factor[1], factor[2], factor[3, 5] = 1e-38, 1e38, 3e-4
    found = storage.nearest(factor)
    assert torch.isfinite(found.scale).all() and (found.scale > 0).all()
    numbers = found.numbers(torch.float32)
    assert torch.isfinite(numbers).all() and (numbers[0] == 0).all()
    assert storage.fault(storage.laid_out(found), (4, 32)) is None


@pytest.mark.parametrize("name, largest", [("int8", 127), ("int4", 7), ("int3", 3), ("int2", 1), ("fp8", 448)])
def test_scales_that_clip(name, largest):
    codes = format_named(name).rounded(torch.tensor([[1000.0, 0.0, 1.0]]), torch.ones(1, 1, dtype=torch.bfloat16))
    assert codes.numbers(torch.float32).tolist() == [[largest, 0, 1]]


def test_numbers_are_rounded_once():
    # 2^-30 is below float16's range, and the product is not
    codes = Codes(torch.full((1, 2), 96, dtype=torch.int8), torch.full((1, 1), 2.0**-30, dtype=torch.bfloat16))
    assert codes.numbers(torch.float16).tolist() == [[pytest.approx(96 * 2.0**-30, rel=0.4)] * 2]


@pytest.mark.parametrize("name", INTEGERS)
def test_a_fit_rounds_column_by_column_with_scales_that_stand(name):
    storage, factor = format_named(name, 16), normal(6, 32)
    scale = storage.scales(factor)
    whole = storage.rounded(factor, scale)
    columns = [storage.rounded(factor[:, j : j + 1], scale[:, j // 16 : j // 16 + 1]).values for j in range(32)]
    assert torch.equal(torch.cat(columns, 1), whole.values)


@pytest.mark.parametrize("name", BITS)
def test_codes_of_a_fit_are_taken_as_they_are(name):
    storage, spec = format_named(name), LowRank(32, 24, 16)
    codes = storage.rounded(normal(24, 16), torch.full((24, 1), 0.5, dtype=torch.bfloat16))
    packed = storage.pack(spec, {"u": codes, "v": normal(16, 32)}, torch.float32, torch.device("cpu"))
    # in memory of its own
    codes.scale.fill_(1)
    assert (packed["u.weight_scale"] == 0.5).all()
    read = storage.codes({key[2:]: value for key, value in packed.items() if key.startswith("u.")}, (24, 16))
    assert torch.equal(read.values.float(), codes.values.float())


WRONG_CODES = {
    "beyond the range": (torch.full((24, 16), 9, dtype=torch.int8), torch.ones(24, 1), r"int8 in \[-8, 7\].*9"),
    "another dtype": (torch.ones(24, 16), torch.ones(24, 1), r"int8 in \[-8, 7\].*float32"),
    "another shape": (torch.ones(24, 15, dtype=torch.int8), torch.ones(24, 1), r"shape \(24, 16\)"),
    "scales of groups": (torch.ones(24, 16, dtype=torch.int8), torch.ones(24, 2), r"scales \(24, 1\)"),
    "a scale of zero": (torch.ones(24, 16, dtype=torch.int8), torch.zeros(24, 1), "finite and positive"),
    "a scale of NaN": (torch.ones(24, 16, dtype=torch.int8), torch.full((24, 1), float("nan")), "finite and positive"),
}


@pytest.mark.parametrize("case", WRONG_CODES)
def test_codes_that_cannot_be_stored(case):
    values, scale, message = WRONG_CODES[case]
    tensors = {"u": Codes(values, scale.bfloat16()), "v": normal(16, 32)}
    with pytest.raises(ValueError, match=rf"codes of u.*{message}"):
        format_named("int4").pack(LowRank(32, 24, 16), tensors, torch.float32, torch.device("cpu"))


def test_what_stores_no_codes_takes_none():
    codes = Codes(torch.ones(2, 2, 16, dtype=torch.int8), torch.ones(2, 2, 1).bfloat16())
    spec, cpu = Blast(32, 24, 16, (2, 2)), torch.device("cpu")
    with pytest.raises(ValueError, match="plain format keeps u as numbers"):
        PLAIN.pack(spec, {"u": codes}, torch.float32, cpu)
    with pytest.raises(ValueError, match="keeps s as numbers"):
        format_named("int4").pack(spec, {"s": codes}, torch.float32, cpu)


@pytest.mark.parametrize(
    "name, group_size, message",
    [
        ("int5", None, r"one of \[.*'int4'.*\], got 'int5'; a later hf_blr may know it"),
        (None, None, "got None"),
        ("int4", 0, "positive integer"),
        ("int4", 2.0, "positive integer"),
        ("int4", True, "positive integer"),
        ("fp8", 64, "'fp8' takes no group_size"),
        ("plain", 64, "'plain' takes no group_size"),
    ],
)
def test_unknown_formats_and_groups(name, group_size, message):
    with pytest.raises(ValueError, match=message):
        format_named(name, group_size)


def test_a_format_is_what_it_says():
    assert format_named("int4", 32) == format_named("int4", 32) != format_named("int4")
    assert all(storage.name == name for name, storage in FORMATS.items())


SPECS = [LowRank(256, 192, 64), Pivoted(256, 192, 64), Monarch(256, 192, 32, (2, 2)), Blast(256, 192, 64, (2, 2))]


@pytest.mark.parametrize("spec", [*SPECS, Dense(256, 192, 192)], ids=lambda spec: spec.structure)
@pytest.mark.parametrize("name, bits", [*INTEGERS.items(), ("fp8", 8)])
def test_bytes_are_bits_scales_and_what_stays_in_16(spec, name, bits):
    group = 32 if name in INTEGERS else None
    kept = {key: shape for key, shape in spec.shapes("factor").items() if key != "s"}
    numbers = sum(torch.Size(shape).numel() for shape in kept.values())
    scales = sum(torch.Size(s).numel() // (group or s[-1]) for s in kept.values())
    rest = 2 * spec.num_blocks[0] * spec.num_blocks[1] * spec.rank if spec.structure == "blast" else 0
    rest += 4 * spec.in_features if spec.structure == "pivoted" else 0
    shapes = 8 * sum(map(len, kept.values())) if name in INTEGERS else 0
    total = format_named(name, group).num_bytes(spec, torch.bfloat16)
    assert total == numbers * bits // 8 + 2 * scales + rest + shapes
    # the shapes of the factors are no more than a rounding of what the bits say
    assert total == pytest.approx(numbers * bits / 8 + 2 * scales + rest, rel=0.01)


def test_groups_that_do_not_divide_and_ranks_too_small():
    assert format_named("int4", 64).misfit(LowRank(256, 192, 64)) is None
    message = format_named("int4", 64).misfit(Blast(256, 192, 48, (2, 2)))
    assert message is not None and "rows of u hold 48" in message and "[2, 4, 8, 16]" in message
    assert "another rank" in str(format_named("int4", 64).misfit(LowRank(256, 192, 7)))
    assert "u [192, 1] takes 48.0 bits a number in int4" in str(format_named("int4").waste(LowRank(256, 192, 1)))
    assert format_named("int4").waste(LowRank(256, 192, 16)) is None
    # a square pivoted layer of full rank has no other features, and nothing of them to store
    assert format_named("int4", 64).misfit(Pivoted(64, 64, 64)) is None
