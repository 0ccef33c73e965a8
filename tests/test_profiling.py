"""Where a graph's time goes: every moment counts once, and kernels are told apart by their names."""

import pytest

from hf_blr.bench.profiling import exclusive, part_of, short, summed


def test_overlapping_kernels_share_no_moment():
    call = [("b", 4.0, 9.0), ("a", 0.0, 5.0), ("c", 6.0, 8.0), ("d", 10.0, 11.0)]
    assert exclusive(call) == [("a", 5.0), ("b", 4.0), ("c", 0.0), ("", 1.0), ("d", 1.0)]
    assert sum(seconds for _, seconds in exclusive(call)) == 11.0


def test_parts_and_kernels_of_one_call():
    calls = [
        [("nvjet_x", 0.0, 10.0), ("decode_project_kernel", 12.0, 15.0), ("triton_poi_fused_add_0", 15.0, 16.0)],
        [("nvjet_x", 0.0, 20.0), ("decode_project_kernel", 20.0, 25.0), ("triton_poi_fused_add_0", 25.0, 26.0)],
    ]
    found = summed(calls)
    parts = {"products": 0.015, "blr": 0.004, "elementwise": 0.001, "attention": 0.0, "idle": 0.001}
    assert found["parts"] == pytest.approx(parts)
    assert found["kernels"][0] == {"kernel": "nvjet_x", "part": "products", "calls": 1.0, "ms": pytest.approx(0.015)}
    assert [row["kernel"] for row in found["kernels"]] == ["nvjet_x", "decode_project_kernel", "triton_poi_fused_add_0"]


@pytest.mark.parametrize(
    "name, part",
    [
        ("nvjet_sm90_tst_128x8_64x12_4x1_v_bz_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(int)", "products"),
        ("triton_red_fused__to_copy_add_mean_mm_mul_pow_0", "products"),
        ("cutlass__5x_cudnn::Kernel<cutlass>", "products"),
        ("triton_red_fused__to_copy_add_mean_grouped_monarch_mul_pow_rsqrt_view_0", "elementwise"),
        ("triton_poi_fused_gelu_view_2", "elementwise"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<int>(int)", "attention"),
        ("block_gemm_kernel", "blr"),
        ("decode_expand_wide_kernel", "blr"),
        ("void at::native::elementwise_kernel<128, 4>(int)", "elementwise"),
    ],
)
def test_names(name, part):
    assert part_of(name) == part


def test_short_names():
    assert short("void at::native::elementwise_kernel<128, 4>(int)") == "at::native::elementwise_kernel"
    assert short("(anonymous namespace)::softmax<float>") == "(anonymous namespace)::softmax<float>"
