"""Models whose layers are stored in bits: planned, streamed, saved, loaded, placed, and shown."""

import inspect
import json

import pytest
import torch
import transformers
from format_cases import DOWN, Q, checkpoint, same, streamed
from safetensors import safe_open
from tiny import build, tiny_bert, tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits, tiny_tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.accelerate import accelerate_disk_offload

import hf_blr
from hf_blr import BLRConfig, compress
from hf_blr.cli import main
from hf_blr.formats import PLAIN, FactorInBits, format_named
from hf_blr.integration import blr_modules, from_config, to_dense
from hf_blr.plan import layers_from_plan, plan_from_layers, resolve_plan
from hf_blr.structures import Dense

MIXED = BLRConfig(
    "blast",
    ratio=0.6,
    num_blocks=2,
    factor_format="int4",
    dense_format="int3",
    group_size=8,
    overrides={
        "(down_proj|attention.output.dense|attn.c_proj)": {"structure": "dense", "dense_format": "fp8"},
        "(k_proj|key|c_fc)": {"structure": "dense"},
        "(up_proj|query)": {"structure": "pivoted", "factor_format": "int8", "group_size": None},
        "(gate_proj|value)": {"structure": "monarch", "factor_format": "int2"},
        "o_proj": {"structure": "low_rank", "factor_format": "plain"},
    },
)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_model_is_streamed_saved_in_shards_and_loaded(make, dtype, tmp_path):
    model = streamed(make().to(dtype), tmp_path, MIXED)
    formats = {module.storage.name for module in blr_modules(model).values()}
    assert {"int4", "int3", "fp8"} <= formats and model.dtype == dtype
    model.save_pretrained(tmp_path / "bits", max_shard_size="20KB")
    assert len(list((tmp_path / "bits").glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "bits")
    same(loaded, model)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    assert loaded.config.quantization_config == model.config.quantization_config
    in_memory = make().to(dtype)
    compress(in_memory, MIXED, progress=False)
    same(in_memory, model)
    held = [module for module in loaded.modules() if isinstance(module, FactorInBits)]
    assert held and not any(p.requires_grad for module in held for p in module.parameters())


def test_the_dtype_that_is_asked_for_reaches_numbers_alone(tmp_path):
    model = streamed(tiny_llama().bfloat16(), tmp_path, MIXED)
    model.save_pretrained(tmp_path / "bits")
    wide = LlamaForCausalLM.from_pretrained(tmp_path / "bits", dtype=torch.float32)
    bits = {key for key in model.state_dict() if "weight_" in key or "fp8" in key}
    assert len(bits) > 30
    for name, module in blr_modules(wide).items():
        narrow = model.get_submodule(name)
        assert module.dtype == torch.float32
        for key, value in module.stored().items():
            old = narrow.stored()[key]
            assert value.dtype == (old.dtype if "." in key or key == "order" else torch.float32)
            assert torch.equal(value.float(), old.float())
    wide.to(torch.bfloat16)
    same(wide, model)


def size_of(folder):
    """Bytes of the tensors in the file, which begins with the length of a header."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_the_file_is_as_large_as_the_bits_say(tmp_path):
    model = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1).bfloat16()
    rest = 2 * sum(p.numel() for name, p in model.named_parameters() if "_proj" not in name)
    weights = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    for name, group_size, bits in (
        ("int4", 64, 4.25),
        ("int3", 64, 3.25),
        ("int2", 64, 2.25),
        ("int8", 128, 8.125),
        ("fp8", None, 8.04),
    ):
        config = BLRConfig("dense", dense_format=name, group_size=group_size)
        stored = streamed(model, tmp_path, config)
        stored.save_pretrained(tmp_path / name)
        assert size_of(tmp_path / name) - rest == pytest.approx(weights * bits / 8, rel=0.01)
    config = BLRConfig("blast", ratio=0.5, factor_format="int4", group_size=32, num_blocks=(4, 4))
    stored = streamed(model, tmp_path, config)
    stored.save_pretrained(tmp_path / "blast")
    size = size_of(tmp_path / "blast")
    plan = plan_from_layers(stored.config.quantization_config.layers)
    said = sum(layer.storage.num_bytes(layer.spec, torch.bfloat16) for layer in plan.values())
    assert size - rest == pytest.approx(said, rel=0.01)
    # u and v in 4 bits and a scale for 32 numbers, s in 16 bits
    small = sum(16 * layer.spec.rank for layer in plan.values())
    numbers = sum(layer.spec.num_parameters for layer in plan.values())
    assert said == pytest.approx((numbers - small) * 4.5 / 8 + 2 * small, rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("bits"))


def casts_offloaded_tensors():
    """Whether this transformers reads what is offloaded to disk in the model's dtype, whatever it was stored in."""
    return "meta_state_dict[target_name].dtype" not in inspect.getsource(accelerate_disk_offload)


@pytest.mark.skipif(not casts_offloaded_tensors(), reason="this release reads offloaded tensors as they are")
def test_offloading_that_would_cast_bits_is_refused(folder, tmp_path):
    placed = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="destroys bits stored as .*; upgrade transformers"):
        LlamaForCausalLM.from_pretrained(folder, device_map=placed, offload_folder=tmp_path)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_bits_are_offloaded_like_numbers(place, folder, tmp_path):
    if place == "disk" and casts_offloaded_tensors():
        pytest.skip("this release casts offloaded tensors, which is refused")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    placed = {**dict.fromkeys(parts, "cpu"), "model.layers.1": place}
    model = LlamaForCausalLM.from_pretrained(folder, device_map=placed, offload_folder=tmp_path / "offload")
    assert torch.equal(tiny_logits(model), tiny_logits(LlamaForCausalLM.from_pretrained(folder)))
    layer = model.model.layers[1].self_attn.q_proj
    assert layer.u.weight_packed.is_meta == (place == "disk")
    model.save_pretrained(tmp_path / "again")
    same(LlamaForCausalLM.from_pretrained(tmp_path / "again"), LlamaForCausalLM.from_pretrained(folder))


def test_streaming_into_an_offloaded_model(tmp_path):
    model = streamed(tiny_llama(), tmp_path, MIXED)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    placed = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    other = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", blr_config=MIXED, device_map=placed, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(tiny_logits(other), tiny_logits(model))


def test_device_map_auto_counts_bits(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.get_memory_footprint() < 1.1 * size
    loaded = LlamaForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": int(1.3 * size)})
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def test_dense_again(folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = tiny_logits(model.float())
    to_dense(model)
    assert not blr_modules(model) and not hasattr(model.config, "quantization_config")
    assert {type(model.get_submodule(name)) for name in (Q, DOWN)} == {nn.Linear}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(tiny_logits(model), before, rtol=1e-3, atol=1e-3)


def test_a_base_model_takes_the_bits_of_a_model_with_a_head(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder)
    same(base, model.model)
    base.save_pretrained(tmp_path)
    same(LlamaForCausalLM.from_pretrained(tmp_path).model, model.model)


@pytest.mark.skipif(not hasattr(transformers, "NomicBertModel"), reason="this release has no NomicBert")
def test_a_family_that_stores_q_k_v_fused(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    dense = build(transformers.NomicBertModel, transformers.NomicBertConfig(**sizes, vocab_size=257))
    overrides = {"k_proj": {"structure": "low_rank", "ratio": 0.7, "factor_format": "int4"}}
    model = streamed(dense, tmp_path, BLRConfig("dense", dense_format="fp8", overrides=overrides))
    assert len(blr_modules(model)) == 7
    model.save_pretrained(tmp_path / "bits")
    same(type(model).from_pretrained(tmp_path / "bits"), model)


def test_a_compressed_model_is_rounded_and_brought_back(tmp_path):
    settings = dict(ratio=0.6, num_blocks=2, overrides={"down_proj": {"structure": "dense", "dense_format": "fp8"}})
    model = tiny_llama()
    compress(model, BLRConfig("blast", **settings), progress=False)
    plain = {name: module.tensors() for name, module in blr_modules(model).items()}
    assert hf_blr.to_format(model, "int8") is model
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    same(loaded, model)
    formats = {name: module.storage.name for name, module in blr_modules(loaded).items()}
    assert formats == {name: "fp8" if name.endswith("down_proj") else "int8" for name in plain}
    for name, module in blr_modules(loaded).items():
        nearest = module.storage.nearest(plain[name]["w" if name.endswith("down_proj") else "u"])
        assert torch.equal(next(module.children())(torch.float32), nearest.numbers(torch.float32))
    logits = tiny_logits(loaded)
    hf_blr.to_format(loaded, "plain")
    assert torch.equal(tiny_logits(loaded), logits)
    assert blr_modules(loaded)[Q].storage == PLAIN and blr_modules(loaded)[DOWN].storage == format_named("fp8")


def test_formats_that_a_model_cannot_be_brought_to(folder, caplog):
    model = LlamaForCausalLM.from_pretrained(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"q_proj: rows of u hold 20 numbers, which groups of 16"):
        hf_blr.to_format(model, "int4", 16)
    with pytest.raises(ValueError, match="got 'int5'"):
        hf_blr.to_format(model, "int5")
    with pytest.raises(ValueError, match="has no BLR modules; compress it first"):
        hf_blr.to_format(tiny_llama(), "int4")
    whole = tiny_llama()
    compress(whole, BLRConfig("dense", dense_format="int4"), progress=False)
    with pytest.raises(ValueError, match="has no factors that could be stored in int8"):
        hf_blr.to_format(whole, "int8")
    assert all(torch.equal(value.float(), before[key].float()) for key, value in model.state_dict().items())
    small = tiny_llama()
    compress(small, BLRConfig("low_rank", rank=1), progress=False)
    hf_blr.to_format(small, "int4")
    assert "stays in the format plain" in caplog.text and blr_modules(small)[Q].storage == PLAIN


def test_it_generates(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    out = model.generate(tiny_inputs(model)["input_ids"], max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 16)


def test_from_config_has_random_bits(folder):
    model = from_config(LlamaForCausalLM.from_pretrained(folder).config)
    assert torch.isfinite(tiny_logits(model)).all()
    assert model.get_submodule(Q).storage == format_named("int3")


def test_dense_layers_are_a_choice_of_a_plan(tmp_path):
    model = tiny_llama()
    overrides = {"down_proj": {"structure": "dense"}, "up_proj": {"structure": "dense", "dense_format": "plain"}}
    config = BLRConfig("low_rank", rank=8, dense_format="int4", group_size=32, overrides=overrides)
    plan = resolve_plan(model, config)
    assert plan[DOWN].spec == Dense(96, 64, 64) and plan[DOWN].storage == format_named("int4", 32)
    assert plan[Q].storage == PLAIN
    # what is to stay dense, and plain, is no part of the plan
    assert not [name for name in plan if name.endswith("up_proj")]
    assert plan_from_layers(json.loads(json.dumps(layers_from_plan(plan)))) == plan
    compress(model, BLRConfig(layers=layers_from_plan(plan)), progress=False)
    report = compress(other := tiny_llama(), config, progress=False)
    same(model, other)
    errors = {layer.name: layer.rel_error for layer in report.layers}
    weight = tiny_llama().get_submodule(DOWN).weight
    expected = (other.get_submodule(DOWN).dense_weight() - weight).norm() / weight.norm()
    assert errors[DOWN] == pytest.approx(expected.item(), rel=1e-4) and 0.05 < errors[DOWN] < 0.15
    saved = sum(layer.spec.dense_parameters - layer.spec.num_parameters for layer in plan.values())
    assert report.parameters_after == report.parameters_before - saved
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in other.parameters()) < report.bytes_before


def test_what_a_budget_leaves_dense_gets_the_dense_format():
    settings = dict(ratio=0.8, factor_format="int4", group_size=8, num_blocks=2, fit_rounds=2)
    ids = [tiny_inputs(tiny_llama())["input_ids"]]
    report = compress(tiny_llama(), BLRConfig("blast", **settings), calibration=ids, progress=False)
    assert report.left_dense
    model = tiny_llama()
    compress(model, BLRConfig("blast", **settings, dense_format="fp8"), calibration=ids, progress=False)
    modules = blr_modules(model)
    assert len(modules) == 14
    for name, module in modules.items():
        assert (module.spec.structure == "dense") == (name in report.left_dense)
        assert module.storage == (format_named("fp8") if name in report.left_dense else format_named("int4", 8))


def test_ranks_of_a_ratio_are_such_that_groups_divide():
    plan = resolve_plan(tiny_llama(), BLRConfig("low_rank", ratio=0.8, factor_format="int4", group_size=4))
    assert all(layer.spec.rank % 4 == 0 for layer in plan.values())
    ranks = resolve_plan(tiny_llama(), BLRConfig("low_rank", ratio=0.8))
    assert all(0 <= ranks[name].spec.rank - layer.spec.rank < 4 for name, layer in plan.items())
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: rows of u hold 10 .*\[2\], or group_size=None"
    ):
        resolve_plan(tiny_llama(), BLRConfig("low_rank", rank=10, factor_format="int4", group_size=4))
    with pytest.raises(ValueError, match=r"down_proj: rows of w hold 96 numbers.*groups of 64"):
        overrides = {"down_proj": {"structure": "dense"}}
        config = BLRConfig("low_rank", rank=8, dense_format="int4", group_size=64, overrides=overrides)
        resolve_plan(tiny_llama(), config)
    with pytest.raises(ValueError, match=r"down_proj: rows of w hold 96"):
        # before hours of calibration, and not after
        resolve_plan(tiny_llama(), BLRConfig(ratio=0.9, num_blocks=1, dense_format="int4", group_size=64, dataset="c4"))


def test_ranks_too_small_for_bits_stay_plain(caplog):
    plan = resolve_plan(tiny_llama(), BLRConfig("low_rank", rank=1, factor_format="int4"))
    assert all(layer.storage == PLAIN for layer in plan.values())
    assert "q_proj: stays in the plain format: u [64, 1] takes 48.0 bits a number" in caplog.text


def test_settings_that_can():
    assert BLRConfig(ratio=0.5, factor_format="int4", group_size=-1).storage_of("blast", {}) == format_named("int4")
    config = BLRConfig(ratio=0.5, factor_format="fp8", dense_format="int8", group_size=64)
    assert config.storage_of("blast", {}) == format_named("fp8")
    assert config.storage_of("dense", {}) == format_named("int8", 64)
    assert config.storage_of("dense", {"group_size": None}) == format_named("int8")
    assert BLRConfig(**{k: v for k, v in config.to_dict().items() if k != "quant_method"}) == config


def test_command_line(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    options = ["--structure", "dense", "--dense-format", "int4", "--group-size", "32", "--dataset", "none"]
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    # 4 bits, a scale of 16 bits for 32 numbers, and the shape of each of 14 matrices
    bits = 4 + 16 / 32 + 14 * 128 / weights
    assert "int4" in out and f"{bits:.2f} bits a weight" in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {module.spec.structure for module in blr_modules(loaded).values()} == {"dense"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert f"{Q}.w.weight_packed" in tensors.keys()  # noqa: SIM118
    assert hf_blr.lora_targets(loaded)
    # a structure that has a size still wants one
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "none"), "--dataset", "none"]) != 0
    assert "give exactly one of ratio" in capsys.readouterr().err
