"""Compressed checkpoints in vLLM's own classes, where vLLM is installed (`pip install hf-blr[vllm]`)."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM

from hf_blr import BLRConfig, LowRank, compress
from hf_blr.plan import LayerPlan

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vLLM is tried on the CPU here", allow_module_level=True)

import vllm_cases
from torch._dynamo.utils import counters
from vllm.config import CompilationMode
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

IDS = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(1))
#: k of the second block stays dense between q and v
DENSE = ["layers.1.self_attn.k_proj"]
CASES = {
    "low_rank": BLRConfig("low_rank", ratio=0.6, overrides={"q_proj": {"ratio": 0.8}}, modules_to_not_convert=DENSE),
    "pivoted": BLRConfig("pivoted", ratio=0.6, modules_to_not_convert=DENSE),
    "monarch": BLRConfig("monarch", rank=8, num_blocks=2, modules_to_not_convert=DENSE),
    "blast": BLRConfig("blast", rank=12, num_blocks=(2, 4), modules_to_not_convert=DENSE),
    "low_rank fp8": BLRConfig("low_rank", rank=16, factor_format="fp8"),
    "monarch int4": BLRConfig("monarch", rank=8, num_blocks=2, factor_format="int4", group_size=8),
    "blast int3": BLRConfig("blast", rank=12, num_blocks=(2, 4), factor_format="int3"),
    "dense int8": BLRConfig("dense", dense_format="int8"),
    # q, k and v of three structures, one in bits beside others that are not
    "mixed": BLRConfig(
        "low_rank",
        rank=16,
        overrides={"q_proj": {"structure": "blast", "rank": 8, "num_blocks": 2}, "k_proj": {"factor_format": "int8"}},
    ),
}
#: of those, what two processes may share
SPLIT = ["low_rank", "monarch", "blast", "monarch int4", "low_rank fp8", "dense int8", "mixed"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with vllm_cases.serving(tmp_path_factory.mktemp("meeting") / "file"):
        yield


def llama(**kw):
    """With biases that are not zero."""
    model = tiny.tiny_llama(attention_bias=True, **kw)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=generator)
    return model


def saved(model, config, folder):
    """The checkpoint, and the compressed model's own logits."""
    compress(model, config, progress=False)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(server, tmp_path, case):
    wanted = saved(llama(), CASES[case], tmp_path)
    config = vllm_cases.configured(tmp_path)
    assert config.model_config.quantization == "hf_blr"
    torch.testing.assert_close(vllm_cases.logits(vllm_cases.loaded(config), config, IDS), wanted)


def test_another_architecture(server, tmp_path):
    wanted = saved(tiny.tiny_qwen3(), BLRConfig("blast", ratio=0.6, num_blocks=4), tmp_path)
    config = vllm_cases.configured(tmp_path)
    torch.testing.assert_close(vllm_cases.logits(vllm_cases.loaded(config), config, IDS), wanted)


def test_a_file_that_has_q_k_and_v_in_one_matrix(server, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 256}
    model = tiny.build(Phi3ForCausalLM, Phi3Config(**sizes, **heads, initializer_range=0.1))
    wanted = saved(model, BLRConfig("monarch", rank=4, num_blocks=4), tmp_path)
    config = vllm_cases.configured(tmp_path)
    torch.testing.assert_close(vllm_cases.logits(vllm_cases.loaded(config), config, IDS), wanted)


def test_vllm_compiles_the_model_once(server, tmp_path):
    wanted = saved(tiny.tiny_llama(), BLRConfig("low_rank", ratio=0.6, factor_format="int4"), tmp_path)
    config = vllm_cases.configured(tmp_path, mode=CompilationMode.DYNAMO_TRACE_ONCE, backend="eager")
    model = vllm_cases.loaded(config)
    counters.clear()
    for tokens in (12, 3, 7):
        torch.testing.assert_close(vllm_cases.logits(model, config, IDS[:tokens]), wanted[:tokens])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """{case: (logits of the compressed model, (those of two processes, widths that low-rank layers summed))}."""
    folders, meeting = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("meeting")
    wanted = {case: saved(llama(), CASES[case], folders / case) for case in SPLIT}
    # two processes hold the same k and v
    one_head = llama(num_key_value_heads=1)
    wanted["one head"] = saved(one_head, BLRConfig("blast", rank=8, num_blocks=2), folders / "one head")
    torch.save(IDS, meeting / "ids")
    program = [sys.executable, Path(vllm_cases.__file__), folders, meeting / "file", meeting / "ids"]
    ranks = [subprocess.Popen([*program, str(rank), "2"], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors
    return {case: (logits, torch.load(folders / case / vllm_cases.OUT)) for case, logits in wanted.items()}


@pytest.mark.parametrize("case", [*SPLIT, "one head"])
def test_two_processes_share_a_model(shared, case):
    wanted, (found, _) = shared[case]
    torch.testing.assert_close(found, wanted)


def test_processes_add_up_the_rank_and_not_the_outputs(shared):
    # o and down of two blocks
    assert shared["low_rank fp8"][1][1] == [16] * 4 and shared["blast"][1][1] == []


def test_a_pivoted_model_is_not_split(server, tmp_path):
    saved(tiny.tiny_llama(), CASES["pivoted"], tmp_path)
    config = vllm_cases.configured(tmp_path).quant_config
    row = RowParallelLinear.__new__(RowParallelLinear)
    torch.nn.Module.__init__(row)
    row.tp_rank = 1
    method = config.get_quant_method(row, "model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match=r"down_proj: pivoted layers cannot be split by inputs.*parallel-size 1"):
        method.create_weights(row, 48, [64], 96, 64, torch.float32)


def test_a_tensor_that_never_comes_ends_the_load(server, tmp_path):
    saved(tiny.tiny_llama(), CASES["low_rank"], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.k_proj.v"]
    save_file(tensors, file)
    config = vllm_cases.configured(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint lacks model.layers.0.self_attn.k_proj.v; save"):
        vllm_cases.loaded(config)


def test_a_server_without_weights_needs_none(server, tmp_path):
    saved(tiny.tiny_llama(), CASES["pivoted"], tmp_path)
    config = vllm_cases.configured(tmp_path, load_format="dummy")
    assert vllm_cases.logits(vllm_cases.loaded(config), config, IDS).isfinite().all()


def test_a_plan_takes_the_names_of_vllms_model(server):
    config = BLRConfig(layers={"model.a.q_proj": LayerPlan(LowRank(8, 8, 2), False, False).to_dict()})
    served = get_quantization_config("hf_blr").from_config(config.to_dict())
    served.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model."}))
    assert list(served.plan) == ["language_model.a.q_proj"]


def test_experts_are_refused(server, tmp_path):
    model = tiny.tiny_mixtral()
    compress(model, BLRConfig("low_rank", rank=8), progress=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"experts.*cannot be served by vLLM yet"):
        vllm_cases.configured(tmp_path)


def test_a_dense_checkpoint_is_refused(server):
    with pytest.raises(ValueError, match="lists no layers"):
        get_quantization_config("hf_blr").from_config(BLRConfig("blast", ratio=0.5).to_dict())
