"""The kernels for few tokens that read factors in bits, under Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import assert_packed_within_budget, layer_in_bits, recorded_grids  # noqa: E402

from hf_blr.formats import format_named  # noqa: E402
from hf_blr.ops.bits import codes_and_scales  # noqa: E402
from hf_blr.ops.grouped_bits import op_name  # noqa: E402
from hf_blr.ops.rules import blast as rules  # noqa: E402
from hf_blr.ops.rules.bits import NUMBERS, PACKED, CodeForm, route  # noqa: E402
from hf_blr.ops.rules.device import H100  # noqa: E402
from hf_blr.ops.rules.few_tokens import DecodeConfig  # noqa: E402
from hf_blr.ops.rules.packed import CHUNK, PlacesConfig, multiplies_by_places, places_config, steps_of  # noqa: E402
from hf_blr.ops.triton import decode_expand, decode_places, decode_project, decode_stack  # noqa: E402
from hf_blr.ops.triton.bits import weights_in_bits  # noqa: E402
from hf_blr.ops.triton.place_tiles import word_of  # noqa: E402
from hf_blr.structures import make_spec  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]

#: (format, numbers that share a scale)
FORMATS = [("int8", None), ("int4", None), ("fp8", None), ("int8", 16), ("int4", 32)]
STRUCTURES = ["low_rank", "monarch", "blast", "pivoted", "dense"]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form, group", FORMATS)
def test_the_error_budget(form, group, structure, tokens):
    # groups of one step and of two
    assert_packed_within_budget(structure, form, group, tokens, (2, 1, 32, 6, 32), torch.float16)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_rows_that_end_within_a_word(form, structure, tokens):
    # float8 is read in whole words
    sizes = (3, 2, 12, 7, 4) if form == "fp8" else (3, 2, 11, 7, 5)
    assert_packed_within_budget(structure, form, None, tokens, sizes, torch.float16, bias=False, activation="silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "form, group, shape", [("int8", None, (5, 20)), ("int4", 6, (2, 3, 18)), ("fp8", None, (3, 8))]
)
def test_numbers_in_one_pass(form, group, shape, dtype):
    storage = format_named(form, group)
    codes = storage.nearest(torch.randn(shape) * 1e-3)
    data = storage.laid_out(codes)[storage.code_part]
    found = torch.ops.hf_blr.numbers(data, codes.scale, storage.bits, shape[-1], dtype)
    assert found.dtype == dtype and torch.equal(found, codes.numbers(dtype))


@pytest.mark.parametrize("form, group", [("int8", 48), ("int4", 48)])
def test_a_first_stage_that_is_a_stack_of_products(form, group, monkeypatch):
    grids = recorded_grids(monkeypatch, decode_stack, "decode_stack_kernel")
    assert_packed_within_budget("monarch", form, group, 17, (2, 1, 96, 10, 48), torch.float16)
    monkeypatch.setattr(rules, "stacks", lambda *args, **kwargs: True)
    assert_packed_within_budget("blast", form, group, 3, (2, 1, 96, 10, 48), torch.float16)
    assert len(grids) == 2


@pytest.mark.parametrize("form, group", [("int4", 128), ("int4", None), ("int8", 64), ("fp8", None)])
def test_place_by_place(form, group, monkeypatch):
    grids = recorded_grids(monkeypatch, decode_places, "decode_places_kernel")
    # one step of the last stage, five of the first
    sizes = (1, 1, 640, 40, 128)
    assert_packed_within_budget("low_rank", form, group, 2, sizes, torch.float16, activation="gelu")
    assert_packed_within_budget("low_rank", form, group, 17, sizes, torch.float16, bias=False)
    assert len(grids) == 4


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("form, group, steps", [("int4", 128, 3), ("int4", None, 3), ("fp8", None, 5)])
def test_steps_that_follow_each_other_without_a_loop(form, group, steps, changed, monkeypatch):
    launches, kernel = [], decode_places.decode_places_kernel

    class Recorded:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                launches.append((grid, kwargs["STEPS"], kwargs["AHEAD"], kwargs["BT"]))
                kernel[grid](*args, **kwargs)

            return run

    monkeypatch.setattr(decode_places, "decode_places_kernel", Recorded())
    monkeypatch.setattr(decode_places, "places_config", lambda *sizes: PlacesConfig(2, 2, 1, 2, 2, changed))
    sizes = (1, 1, 640, 40, 128)
    # two groups of 16 tokens, of which the second has one; a last stage of one step, whose second part is empty
    assert_packed_within_budget("low_rank", form, group, 17, sizes, torch.float16)
    assert launches == [((4, 1, 2), steps, 2, 16), ((2, 1, 2), 1, 1, 16)]
    # 5 tokens are one group; more steps are a loop
    monkeypatch.setattr(decode_places, "MOST_STEPS", 2)
    assert_packed_within_budget("low_rank", form, group, 5, sizes, torch.float16, activation="gelu")
    assert launches[2:] == [((4, 1, 1), 0, 1, 8), ((2, 1, 1), 1, 1, 8)]


@pytest.mark.parametrize("add, ahead", [(False, 0), (True, 0), (True, 1)])
def test_programs_share_long_rows(add, ahead, monkeypatch):
    # three programs of two parts, of which the last are empty; 16 rows of 40 are the last tile's of two programs
    config = PlacesConfig(2, 2, 3, ahead)
    monkeypatch.setattr(decode_places, "places_config", lambda *sizes: config)
    grids = recorded_grids(monkeypatch, decode_places, "decode_places_kernel")
    x, z = torch.randn(3, 2 * 520), torch.randn(2, 3, 2 * 20)
    storage = format_named("int4", None)
    codes = storage.nearest(torch.randn(2, 40, 520))
    v = weights_in_bits(storage.laid_out(codes)[storage.code_part], codes.scale, 4, 520)
    wanted = torch.einsum("tbp,brp->btr", x.view(3, 2, 520).double(), codes.numbers(torch.float64))
    wanted = wanted.view(2, 3, 2, 20).permute(2, 1, 0, 3).reshape(2, 3, 40) + (z.double() if add else 0)
    decode_places.project_by_places(x, v, z, add)
    assert grids == [(2, 2, 3)]
    assert torch.allclose(z.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("v, changed", [(4, True), (4, False), (2, False), (1, False)])
def test_each_lane_has_words_of_its_own(v, changed):
    loads = [[word_of.fn(lane, i // 2, i % 2, v, changed) for lane in range(4)] for i in range(4)]
    assert sorted(word for words in loads for word in words) == list(range(16))
    # inputs of four words of int4 that lanes load at once, 16 bytes each, lie in different banks, as eight fill these
    assert not changed or all(len({word % 8 for word in words}) == 4 for words in loads)


def test_settings_of_int4_in_groups():
    def config(rows, row, tokens=16, per=8, group=128):
        return places_config(row, rows, 1, tokens, per, 2, H100, group)

    # tiles of 1024 rows would leave half of the multiprocessors idle, those of 1536 would not
    assert [config(n, 4096).groups for n in (1024, 1536)] == [2, 1]
    assert all(config(*sizes).ahead for sizes in ((1536, 4096), (4096, 1024), (4096, 1536)))
    # inputs are most of what is read, the more so of few rows and of few words
    assert all(config(*sizes).changed for sizes in ((1536, 4096), (4096, 1024), (14336, 1536), (1536, 14336)))
    # of a long row as many words as come before the wait
    long = config(1536, 14336)
    assert 8 * CHUNK * long.parts * long.splits * long.ahead >= 14336
    others = (config(1024, 4096, tokens=17), config(1024, 4096, per=4), config(1024, 4096, group=0))
    assert not any(c.ahead or c.groups > 1 or c.changed for c in others)


def test_a_short_last_step():
    # whole steps, and the power of two that holds the rest unless that is a step itself
    assert [steps_of(n, 64, 8) for n in (198, 192, 230, 20)] == [(3, 8), (3, 0), (4, 0), (1, 0)]
    # no shorter than what a warp reads
    assert [steps_of(n, 64, 32) for n in (193, 230)] == [(3, 32), (4, 0)]


def test_what_is_multiplied_place_by_place():
    assert all(multiplies_by_places(*sizes) for sizes in ((128, 8), (64, 4), (0, 8)))
    assert not multiplies_by_places(64, 8)


def test_steps_lie_in_one_group(monkeypatch):
    for module, name in ((decode_project, "packed_project_config"), (decode_expand, "packed_expand_config")):
        monkeypatch.setattr(module, name, lambda *sizes: DecodeConfig(16, 64, 4, 1))
    assert_packed_within_budget("low_rank", "int4", 48, 3, (2, 1, 96, 10, 48), torch.float16)


def test_which_layers_are_read_packed():
    spec = make_spec("low_rank", 96, 100, rank=20)
    for bits, group, float8, wanted in (
        (4, None, False, True),
        (8, 4, False, False),
        (3, None, False, False),
        (8, None, True, True),
    ):
        form = CodeForm(bits, group, float8)
        assert (route(spec, 32, form, False, True) == PACKED) == wanted
        assert route(spec, 33, form, False, True) == NUMBERS
    odd = make_spec("low_rank", 96, 100, rank=18)
    assert route(odd, 1, CodeForm(8, None, True), False, True) == NUMBERS
    assert route(make_spec("blast", 130, 130, rank=2, num_blocks=65), 1, CodeForm(4), False, True) == NUMBERS


@pytest.mark.parametrize("structure", ["blast", "pivoted"])
def test_opcheck(structure):
    held, _ = layer_in_bits(structure, "int4", 16, (2, 1, 32, 6, 16), torch.float16)
    parts = codes_and_scales(structure, held, torch.float16)
    x = torch.randn(2, 64).half()
    torch.library.opcheck(getattr(torch.ops.hf_blr, f"{structure}_packed"), (x, *parts, None, "silu"))
    if structure == "blast":
        grouped = getattr(torch.ops.hf_blr, op_name(structure))
        torch.library.opcheck(grouped, (x, *(part * 2 for part in parts), [None, None], "", False))
        torch.library.opcheck(grouped, (x[:1], *(part * 2 for part in parts), [None, None], "silu", True))
    codes, scale, bits, length = held[0]
    torch.library.opcheck(torch.ops.hf_blr.numbers, (codes, scale, bits, length, torch.float16))
