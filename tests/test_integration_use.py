"""A compressed model is a normal model: what users and other tools do with it after loading."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import tiny_llama, tiny_logits, tiny_tokenizer
from transformers import CompileConfig, LlamaForCausalLM, pipeline

from hf_blr.config import BLRConfig
from hf_blr.integration import blr_modules, from_config, register
from hf_blr.structures.blast.layer import BlastLinear

register()

IDS = torch.arange(5).unsqueeze(0)
GENERATE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = BLRConfig("blast", ratio=0.6)
    from_config(tiny_llama().config, LlamaForCausalLM, blr_config=config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder)


def test_transformers_does_not_take_it_for_quantised(model):
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert {p.dtype for p in copy.deepcopy(model).half().parameters()} == {torch.float16}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_saves_the_state_dict_that_it_is_given(model, folder, tmp_path):
    # sharded training gathers the weights itself and passes them here
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    saved = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[key], state[key]) for key in state)


def test_pickle_and_deepcopy(model):
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert len(blr_modules(copied)) == 14
        assert torch.equal(tiny_logits(copied), tiny_logits(model))


def test_resized_embeddings_survive_the_file(model, tmp_path):
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (300, 64)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def test_generate_prefers_what_the_logits_say(model):
    tokens = model.generate(IDS, **GENERATE)
    assert tokens.shape == (1, 13)
    with torch.no_grad():
        logits = model(tokens).logits
    assert torch.equal(tokens[0, 5:], logits[0, 4:-1].argmax(-1))


def test_a_pipeline_takes_the_folder(model, folder):
    tiny_tokenizer().save_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder))
    assert isinstance(generate.model.model.layers[0].self_attn.q_proj, BlastLinear)
    (answer,) = generate("A line", max_new_tokens=8, do_sample=False, return_full_text=False)
    ids = generate.tokenizer("A line", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer["generated_text"] == generate.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.slow
def test_compiled_generation_equals_eager(model):
    eager = model.generate(IDS, **GENERATE)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    # transformers compiles on accelerators only, unless told otherwise
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = model.generate(IDS, **GENERATE, cache_implementation="static", compile_config=compiled)
    assert torch.equal(static, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def run(code, *args):
    """What a fresh process prints, both streams together."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_without_the_import_and_with_an_attention_of_its_own_a_load_warns_and_is_random(folder):
    # documents the case that the notice in the config does not reach; the method's name is the only hint there is
    code = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa")
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    printed = run(code, folder)
    assert "Unknown quantization type, got hf_blr" in printed
    assert "Linear" in printed.splitlines()
    assert "BlastLinear" not in printed


@pytest.mark.slow
def test_registration_imports_nothing_heavy_and_works_in_any_order(folder):
    code = """
import sys
early = sys.argv[2] == "transformers first"
if early:
    import peft, transformers.modeling_utils
import hf_blr.integration as integration
integration.register()
integration.register()
if not early:
    print("loaded", [name for name in ("triton", "peft", "transformers.modeling_utils") if name in
    sys.modules])
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("found", type(model.model.layers[0].self_attn.q_proj).__name__)
from peft import LoraConfig, get_peft_model
get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
print("adapted", type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    lines = run(code, folder, "hf_blr first").splitlines()
    assert "loaded []" in lines
    assert "found BlastLinear" in lines
    assert "adapted LoraBLRLinear" in lines
    lines = run(code, folder, "transformers first").splitlines()
    assert "found BlastLinear" in lines
    assert "adapted LoraBLRLinear" in lines


@pytest.mark.slow
def test_a_second_import_of_the_package_still_works(folder):
    code = """
import importlib, sys
import hf_blr.integration as integration
integration.register()
import transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_blr"]:
    del sys.modules[name]
import hf_blr.integration as again
assert again is not integration
again.register()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("found", len(again.blr_modules(model)))
"""
    assert "found 14" in run(code, folder).splitlines()
