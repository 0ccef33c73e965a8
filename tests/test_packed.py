"""The kernels for few tokens that read factors in bits, under Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import assert_packed_within_budget  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]

#: (format, numbers that share a scale); rows of the sizes below are multiples of the groups
FORMATS = [("int8", None), ("int4", None), ("fp8", None), ("int8", 16), ("int4", 16), ("int4", 48)]
STRUCTURES = ["low_rank", "monarch", "blast", "pivoted", "dense"]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form, group", FORMATS)
def test_the_error_budget(form, group, structure, tokens):
    assert_packed_within_budget(structure, form, group, tokens, (3, 2, 96, 20, 48), torch.float16)
