"""The kernels at real sizes on a GPU, in bfloat16 and the other dtypes."""

import pytest
import torch
from kernel_cases import FUNCTIONS, assert_within_budget, make_inputs

from hf_blr import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# B1, B2, P, Q, R
SIZES = [
    (4, 4, 256, 256, 256),
    (4, 16, 256, 64, 1016),
    (16, 16, 43, 48, 96),
    (6, 6, 128, 384, 191),
    (3, 5, 36, 48, 7),
    (16, 4, 64, 128, 128),
    (1, 1, 512, 384, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 300])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_kernels_keep_the_error_budget(structure, tokens, size):
    assert_within_budget(structure, make_inputs(structure, tokens, *size, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 130])
@pytest.mark.parametrize("structure", FUNCTIONS)
def test_other_dtypes_keep_the_error_budget(structure, tokens, dtype):
    assert_within_budget(structure, make_inputs(structure, tokens, 4, 8, 64, 48, 72, dtype, "cuda", bias=False))


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_real_layer(structure):
    rank = 1024 if structure != "monarch" else 256
    assert_within_budget(structure, make_inputs(structure, 1024, 4, 4, 1024, 1024, rank, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("structure", FUNCTIONS)
@pytest.mark.parametrize("tokens", [1, 200])
def test_results_repeat_bit_for_bit(structure, tokens):
    tensors = make_inputs(structure, tokens, 4, 16, 128, 64, 256, torch.bfloat16, "cuda")
    runs = [FUNCTIONS[structure][0](*tensors, impl="triton") for _ in range(3)]
    assert all(torch.equal(runs[0], r) for r in runs[1:])


@pytest.mark.parametrize("structure", FUNCTIONS)
@pytest.mark.parametrize("tokens", [1, 200])
def test_runs_in_a_cuda_graph(structure, tokens):
    tensors = [t.detach() for t in make_inputs(structure, tokens, 4, 16, 128, 64, 256, torch.bfloat16, "cuda")]
    function = FUNCTIONS[structure][0]
    expected = function(*tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*tensors)
    tensors[0].neg_()
    graph.replay()
    assert torch.equal(out, FUNCTIONS[structure][0](*tensors)) and not torch.equal(out, expected)


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_compiles_without_a_graph_break(structure):
    tensors = make_inputs(structure, 64, 4, 16, 64, 32, 64, torch.bfloat16, "cuda")
    with ops.use_impl("triton"):
        compiled = torch.compile(FUNCTIONS[structure][0], fullgraph=True)
        out, expected = compiled(*tensors), FUNCTIONS[structure][0](*tensors)
    assert torch.equal(out, expected)


def test_autocast_runs_in_its_dtype():
    tensors = make_inputs("blast", 40, 4, 4, 32, 32, 48, torch.float32, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = ops.blast_linear(*tensors, impl="triton")
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


def test_training_builds_no_dense_weight():
    tensors = make_inputs("blast", 256, 4, 4, 1024, 1024, 128, torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.blast_linear(*tensors).sum().backward()
    # the dense weight alone would be 32 MiB
    assert torch.cuda.max_memory_allocated() - before < 24 * 2**20
