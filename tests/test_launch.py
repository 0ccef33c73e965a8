"""Launch choices are plain functions: they fit every card and depend on nothing but their arguments."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compile_targets import DEVICES

from hf_blr.ops.rules import few_tokens, mix, products, swap
from hf_blr.ops.rules.device import pow2, vector_width

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_gemm_tiles_fit_shared_memory(device):
    for chunk, tokens, itemsize in itertools.product((7, 48, 64, 1024), (33, 4096), (2, 4)):
        c = products.gemm_config(chunk, tokens, itemsize, device)
        assert c.stages * (c.bt + c.bn) * c.bk * itemsize <= device.shared_memory
        assert c.bk >= 16 and c.stages >= 2


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_decode_tiles_fit_shared_memory(device):
    for parts, rank, tokens, itemsize in itertools.product((1, 4, 16, 64), (7, 1024, 1488), (2, 16, 32), (2, 4)):
        for mixes in (True, False):
            c = few_tokens.project_config(parts, 4096, rank, tokens, mixes, itemsize, device)
            bt = few_tokens.decode_rows(tokens)
            stage = pow2(parts) * c.length * (c.rows + bt) * itemsize
            assert c.length == 16 or c.stages * stage <= device.shared_memory
        c = few_tokens.expand_config(rank, 4096, tokens, itemsize, device)
        assert c.stages * c.length * (c.rows + bt) * itemsize <= device.shared_memory


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_programs_that_loop_fit_beside_each_other(device):
    ranks, outputs = (7, 512, 1488, 1536, 2384), (4096, 11008)
    for rank, n, tokens, itemsize in itertools.product(ranks, outputs, (2, 16), (2, 4)):
        c = few_tokens.expand_config(rank, n, tokens, itemsize, device)
        if c.programs:
            z_and_rows = few_tokens.decode_rows(tokens) + (c.stages - 1) * c.rows
            assert c.programs * z_and_rows * rank * itemsize <= device.shared_memory
            assert itemsize == 2 and tokens > 1 and n > 32 * device.sms


def test_programs_loop_where_that_was_faster():
    def loops(rank, outputs, tokens, itemsize=2, sm=90):
        return few_tokens.expand_config(rank, outputs, tokens, itemsize, DEVICES[sm]).programs > 0

    assert all(loops(rank, outputs, 16) for rank, outputs in ((1488, 11008), (1408, 11008), (816, 8192)))
    # few outputs, many tokens, z too long for registers, rows no multiple of 16 bytes, float32, a small card
    assert not loops(1024, 4096, 16)
    assert not loops(1488, 11008, 32)
    assert not loops(2384, 11008, 16)
    assert not loops(1487, 11008, 16)
    assert not loops(1488, 11008, 16, itemsize=4)
    assert not loops(1488, 11008, 16, sm=86)


def test_small_cards_get_smaller_tiles():
    large, small = (products.fused_mix_config(4, 2, DEVICES[sm]) for sm in (90, 86))
    assert large.bk > small.bk


def test_token_count_changes_few_settings():
    settings = {products.gemm_config(1024, tokens, 2, DEVICES[90]) for tokens in range(33, 5000)}
    settings |= {few_tokens.project_config(4, 4096, 1024, t, True, 2, DEVICES[90]) for t in range(2, 33)}
    settings |= {few_tokens.expand_config(1024, 4096, t, 2, DEVICES[90]) for t in range(2, 33)}
    assert len(settings) <= 8


def test_mix_is_fused_where_that_was_faster():
    fuses = mix.fuses_mix
    assert fuses(4, 16, 256, 1024, 1024) and fuses(2, 16, 256, 1024, 4096)
    assert not fuses(4, 4, 1024, 1024, 1024)
    assert not fuses(4, 16, 256, 1024, 128)
    assert not fuses(4, 16, 688, 1488, 1024)
    assert not fuses(16, 16, 256, 1024, 1024)


def test_monarch_copies_where_that_was_faster():
    swapped = swap.reads_swapped
    # steps of 64: most sizes in place, few tiles and very wide blocks copied
    assert swapped(4, 4, 1024, 256, 1024) and swapped(4, 12, 1024, 256, 128) and swapped(4, 8, 2048, 192, 8192)
    assert not swapped(4, 4, 1024, 256, 128) and not swapped(4, 8, 3584, 384, 1024)
    # of 32: MLPs copied
    assert swapped(4, 4, 1024, 352, 8192) and swapped(16, 32, 688, 96, 1024) and swapped(16, 16, 512, 32, 8192)
    assert not swapped(4, 8, 2752, 352, 1024) and not swapped(4, 4, 1024, 352, 512)
    # of 16
    assert swapped(16, 16, 128, 48, 1024) and not swapped(16, 16, 512, 48, 1024) and not swapped(16, 16, 128, 16, 256)
    # few tiles with short sums
    assert swapped(4, 8, 128, 32, 1024) and swapped(4, 8, 256, 96, 512)
    # shorter steps never; with a bias, those that were always read in place
    assert not swapped(4, 4, 192, 20, 8192)
    assert swapped(4, 8, 2752, 352, 64, adds=True) and not swapped(4, 4, 576, 48, 8192, adds=True)


def test_monarchs_rule_against_what_was_measured():
    """Never an eighth slower than the other way, and all sizes together at most a hundredth."""
    rows = json.loads((RESULTS / "monarch_last_stage_h100.json").read_text())["rows"]
    lost = []
    for row in rows:
        in_place = swap.reads_swapped(*(row[size] for size in ("b1", "b2", "q", "rank", "tokens")))
        taken = row["in_place_us"] if in_place else row["copied_us"]
        lost.append(taken / min(row["in_place_us"], row["copied_us"]))
    assert max(lost) < 1.125 and statistics.geometric_mean(lost) < 1.01


def test_first_stages_are_stacks_where_that_was_faster():
    def stacks(*sizes, **kw):
        return few_tokens.stacks(*sizes, DEVICES[90], **kw)

    assert stacks(17, 4, 3072, 1024) and stacks(32, 4, 1024, 1024) and stacks(2, 4, 1408, 2752)
    assert not stacks(16, 4, 3072, 1024) and not stacks(1, 4, 1408, 2752) and not stacks(32, 1, 1024, 4096)
    # too few programs
    assert not stacks(8, 2, 1408, 4096)
    assert stacks(32, 4, 1488, 2752, mix=True) and stacks(17, 16, 1456, 688, mix=True)
    assert (
        stacks(17, 4, 816, 2048, mix=True)
        and not stacks(32, 4, 1024, 1024, mix=True)
        and not stacks(16, 4, 1488, 2752, mix=True)
    )


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_stacks_fit_shared_memory(device):
    for tokens, itemsize in itertools.product((2, 17, 32), (2, 4)):
        c = few_tokens.stack_config(tokens, itemsize, device)
        assert c.stages * (c.rows + few_tokens.decode_rows(tokens)) * c.length * itemsize <= device.shared_memory
        assert c.length * itemsize == 128 and c.stages >= 4


@pytest.mark.parametrize("sizes, width", [((16, 32), 16), ((1016, 4096), 8), ((1022,), 2), ((7, 16), 1)])
def test_vector_width(sizes, width):
    assert vector_width(*sizes) == width


@pytest.mark.parametrize("b1, b2, group", [(4, 4, 4), (4, 16, 4), (16, 4, 1), (3, 5, 5), (6, 7, 1), (1, 16, 16)])
def test_ds_group_divides_the_blocks(b1, b2, group):
    assert mix.ds_group(b1, b2) == group


def test_decode_reads_no_more_than_a_piece_of_a_row():
    for parts, row in ((4, 256), (4, 4096), (16, 4096)):
        c = few_tokens.project_config(parts, row, 1024, 16, False, 2, DEVICES[90])
        assert c.length <= max(16, pow2(row // parts))


def test_registers_of_a_thread_let_all_programs_stay():
    for warps, programs in itertools.product((1, 2, 4, 8, 16), (1, 2, 3, 5, 10)):
        registers = few_tokens.OneConfig(4, 256, warps, programs).registers
        assert 32 <= registers <= 255
        assert registers == 32 or 32 * warps * programs * registers <= few_tokens.REGISTERS


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_programs_of_one_token_fit_the_registers(device):
    """Two tiles and the vector of each program that is asked for; a warp never reads less than 16 bytes a lane."""
    for row, itemsize in itertools.product((7, 304, 1024, 1488, 2752, 4096, 11008, 28672), (2, 4)):
        for layers, rows in itertools.product((1, 2), (304, 12288)):
            c = few_tokens.one_config(row, rows, layers, itemsize, device)
            # the vector of a layer is held once by all warps of a row
            beside = c.warps * 512 // (c.length * itemsize)
            held = (2 * c.rows * layers + max(beside, layers)) * -(-row // c.length) * c.length * itemsize // 4
            assert c.programs == 1 or c.programs * held <= few_tokens.REGISTERS
            assert c.rows * layers == beside or (c.warps == 16 and c.rows == beside == 1)
        for b1 in (1, 4, 16):
            c = few_tokens.one_mix_config(b1, -(-row // b1), itemsize, device)
            assert c.programs == 1 or c.programs * 3 * c.rows * row * itemsize // 4 <= few_tokens.REGISTERS
            # no two warps hold the same, where rows are long enough
            assert c.warps <= 4 or c.rows * pow2(b1) * c.length * itemsize >= c.warps * 512
