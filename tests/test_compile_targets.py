"""Every kernel builds for the cards that are supported and fits their shared memory, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90])
def test_kernels_build_and_fit(capability):
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_targets.py")
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = {row["kernel"] for row in rows}
    casts = {"cast_columns_kernel", "cast_rows_kernel", "column_squares_kernel", "transpose_codes_kernel"}
    float8 = casts | {"float8_gemm_kernel", "float8_mix_kernel", "mix_weights_kernel"} if capability >= 89 else set()
    plain = {
        "attend_kernel",
        "attend_sum_kernel",
        "block_gemm_kernel",
        "blast_expand_kernel",
        "blast_mix_kernel",
        "blast_ds_kernel",
        "decode_project_kernel",
        "decode_expand_kernel",
        "decode_expand_wide_kernel",
        "decode_one_kernel",
        "decode_one_mix_kernel",
        "decode_stack_kernel",
        "expert_rows_kernel",
        "losses_kernel",
        "losses_backward_kernel",
        "decode_places_kernel",
        "decode_sums_kernel",
        "numbers_kernel",
        "swap_blocks_kernel",
        "columns_kernel",
        "pivoted_project_kernel",
        "round_columns_kernel",
    }
    assert names == float8 | ({"columns_kernel"} if capability == 89 else plain)
    # one for all formats of integers, since a fit in bits waits for each
    assert capability == 89 or sum(row["kernel"] == "round_columns_kernel" for row in rows) == 2
    for row in rows:
        assert row["shared"] <= row["limit"], row
    on_tensor_cores = {row["kernel"] for row in rows if row["wgmma" if capability == 90 else "mma"]}
    assert on_tensor_cores >= {"block_gemm_kernel", "blast_expand_kernel", "float8_gemm_kernel"} & names
    # neither Hopper's products of four warps, which take places of words through shared memory, nor loads that do
    places = [row for row in rows if row["kernel"] == "decode_places_kernel"]
    assert all(row["mma"] and not row["wgmma"] and row["shared"] <= 1 << 14 for row in places)
    # float8 numbers as such, and not turned into others before they are multiplied
    assert capability != 90 or all(row["wgmma_float8"] for row in rows if row["kernel"] == "float8_gemm_kernel")
    of_one = [row for row in rows if row["kernel"] == "decode_one_kernel"]
    assert not any(row["policies"] for row in of_one)
    # of warps with rows of their own: the vector does not pass through shared memory, where the product of two does
    assert all(0 < row["barriers"] <= 4 for row in of_one if row["gated"])
    # a kernel that runs beside the one before waits for it at its end, and no other does
    assert capability != 90 or {row["beside"] for row in of_one} == {True, False}
    assert capability != 90 or all(row["waits_last"] == row["beside"] for row in of_one)
