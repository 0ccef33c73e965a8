"""Experts whose factors, or whole matrices, are kept in bits: chosen by their own Grams, stored, loaded, run."""

import copy
import json

import pytest
import torch
from expert_cases import gpt_oss, make_experts, make_tokens, qwen3_moe
from safetensors.torch import load_file, save_file
from tiny import batches_for, tiny_inputs, tiny_logits, tiny_mixtral

from hf_blr import BLRConfig, compress, to_dense, to_format
from hf_blr.calibration.training_form import close_bits, open_bits
from hf_blr.cli import main
from hf_blr.compression import replace
from hf_blr.experts import ExpertsLinear
from hf_blr.factorize import factorize
from hf_blr.formats import FORMATS, FactorInBits, format_named
from hf_blr.linear import blr_modules
from hf_blr.ops import use_impl
from hf_blr.ops.dispatch import triton_problem

FORMATS_OF_BITS = ("int8", "int4", "fp8")


def experts_of(model):
    return {name: module for name, module in blr_modules(model).items() if isinstance(module, ExpertsLinear)}


@pytest.mark.parametrize("form", FORMATS_OF_BITS)
@pytest.mark.parametrize("make", [tiny_mixtral, gpt_oss])
def test_they_are_saved_loaded_streamed_and_made_dense(make, form, tmp_path):
    dense, model = make(), make()
    config = BLRConfig("low_rank", ratio=0.5, factor_format=form)
    compress(model, config, progress=False)
    assert {module.storage.name for module in experts_of(model).values()} == {form}
    model.save_pretrained(tmp_path / "factors")
    loaded = type(model).from_pretrained(tmp_path / "factors")
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    dense.save_pretrained(tmp_path / "dense")
    streamed = type(model).from_pretrained(tmp_path / "dense", blr_config=config)
    for name, module in experts_of(model).items():
        for key, value in module.stored().items():
            held = streamed.get_submodule(name).stored()[key]
            # fits to the same weights, in threads of their own, differ in the last digits
            assert held.dtype == value.dtype and held.shape == value.shape
    torch.testing.assert_close(tiny_logits(streamed), tiny_logits(model), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(tiny_logits(to_dense(copy.deepcopy(model))), tiny_logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMATS_OF_BITS)
def test_codes_are_chosen_with_the_gram_of_each_expert(form, monkeypatch):
    model, seen, original = qwen3_moe(), {}, replace.fit_layer
    dense = copy.deepcopy(model)

    def spy(model, layer, plan, problem, *rest):
        seen[layer] = problem
        return original(model, layer, plan, problem, *rest)

    monkeypatch.setattr(replace, "fit_layer", spy)
    config = BLRConfig("low_rank", ratio=0.5, factor_format=form, sequential=False, fisher=False)
    compress(model, config, calibration=batches_for(model), progress=False)
    name = "model.layers.0.mlp.experts.down_proj"
    module = model.get_submodule(name)
    weight = dense.model.layers[0].mlp.experts.down_proj
    for expert in (0, 3):
        problem = seen[f"{name}.{expert}"]
        options = config.fit_options(module.in_features, problem.rows)
        wanted = factorize(weight[expert], module.spec, problem.gram, options=options, storage=module.storage)
        for factor in ("u", "v"):
            found = module.storage.codes(getattr(module, factor).parts(), getattr(module, factor).shape)
            assert torch.equal(found.values[expert], wanted.tensors[factor].values)
            assert torch.equal(found.scale[expert], wanted.tensors[factor].scale)


@pytest.mark.parametrize("form", FORMATS_OF_BITS)
@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "monarch", "blast"])
def test_few_rows_read_the_codes_of_their_experts_alone(structure, form, monkeypatch):
    torch.manual_seed(0)
    experts = make_experts(structure, num_experts=7, storage=FORMATS[form])
    read, forward = [], FactorInBits.forward

    def spy(held, dtype=None, chosen=None):
        read.append(held.shape[0] if chosen is None else len(chosen))
        return forward(held, dtype, chosen)

    for tokens in (1, 3, 20):
        given = make_tokens(experts, tokens)
        wanted = experts.one_by_one(*given)
        monkeypatch.setattr(FactorInBits, "forward", spy)
        torch.testing.assert_close(experts(*given), wanted, rtol=1e-4, atol=1e-5)
        assert set(read) == {min(2 * tokens, 7)}
        read.clear()
        monkeypatch.undo()


def test_whole_experts_are_kept_in_bits(tmp_path):
    model = tiny_mixtral()
    dense = tiny_logits(model)
    compress(model, BLRConfig("dense", dense_format="int8"), progress=False)
    kept = experts_of(model)
    assert len(kept) == 4 and {module.spec.structure for module in kept.values()} == {"dense"}
    assert (tiny_logits(model) - dense).norm() < 0.02 * dense.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_logits(type(model).from_pretrained(tmp_path)), tiny_logits(model))


def test_what_a_budget_leaves_dense_is_kept_in_bits():
    model = qwen3_moe()
    config = BLRConfig("low_rank", ratio=0.95, allocation="loss", dense_format="int8", factor_format="int8")
    compress(model, config, calibration=batches_for(model), progress=False)
    kept = experts_of(model)
    assert len(kept) == 4 and {module.storage.name for module in kept.values()} == {"int8"}


def test_other_formats_and_back():
    model = tiny_mixtral()
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    plain = tiny_logits(model)
    to_format(model, "int8")
    assert {module.storage.name for module in experts_of(model).values()} == {"int8"}
    in_bits = tiny_logits(model)
    assert 0 < (in_bits - plain).norm() < 0.05 * plain.norm()
    to_format(model, "plain")
    torch.testing.assert_close(tiny_logits(model), in_bits, rtol=1e-4, atol=1e-4)


def test_inspect_counts_the_bits_of_every_expert(tmp_path, capsys):
    model = tiny_mixtral()
    config = BLRConfig("low_rank", ratio=0.5, factor_format="int4", target_modules=["gate_up_proj", "down_proj"])
    compress(model, config, progress=False)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json", str(tmp_path / "f.json")]) == 0
    rows = {row["layers"]: row for row in json.loads((tmp_path / "f.json").read_text())["rows"]}
    files = [path for path in tmp_path.glob("*.safetensors") for path in [path]]
    tensors = {key: value for path in files for key, value in load_file(path).items() if "experts" in key}
    for kind, shape in (("gate_up_proj", (192, 64)), ("down_proj", (64, 96))):
        stored = sum(value.nbytes for key, value in tensors.items() if kind in key)
        numbers = 2 * 4 * shape[0] * shape[1]
        assert rows[f"2 x {kind}"]["bits a weight"] == pytest.approx(8 * stored / numbers)


@pytest.mark.parametrize("what", ["shape", "scale"])
def test_damaged_codes_are_refused(what, tmp_path):
    model = tiny_mixtral()
    compress(model, BLRConfig("low_rank", ratio=0.5, factor_format="int4"), progress=False)
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    key = f"model.layers.1.block_sparse_moe.experts.down_proj.u.weight_{what}"
    if what == "shape":
        tensors[key] = tensors[key] + 1
    else:
        tensors[key][3, 2] = -1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="experts.down_proj.u"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["scales", "codes"])
def test_codes_and_scales_train(what):
    model = tiny_mixtral()
    compress(model, BLRConfig("low_rank", ratio=0.5, factor_format="int4"), progress=False)
    before = tiny_logits(model)
    open_bits(model, what)
    torch.testing.assert_close(tiny_logits(model), before, rtol=1e-4, atol=1e-4)
    model(**tiny_inputs(model))[0].square().mean().backward()
    held = experts_of(model)["model.layers.0.mlp.experts.gate_up_proj"].u
    assert held.log_scale.grad.abs().sum() > 0 and (held.latent.grad is not None) == (what == "codes")
    close_bits(model)
    assert torch.equal(tiny_logits(model), before)


@pytest.mark.skipif(triton_problem() is not None, reason="needs Triton")
@pytest.mark.parametrize("form, group", [("int8", None), ("int4", 16), ("int4", None), ("fp8", None)])
@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "monarch", "blast"])
def test_the_kernel_for_few_rows_reads_codes(structure, form, group, monkeypatch):
    torch.manual_seed(0)
    sizes = {"num_experts": 5, "hidden": 64, "inner": 96, "rank": 32}
    experts = make_experts(structure, **sizes, storage=format_named(form, group))
    # the interpreter takes its time for each row of a matrix
    given = make_tokens(experts, 2, each=1)
    wanted = experts.one_by_one(*given)
    numbers = []
    forward = FactorInBits.forward
    monkeypatch.setattr(FactorInBits, "forward", lambda held, *args: numbers.extend(args) or forward(held, *args))
    with torch.no_grad(), use_impl("triton"):
        found = experts(*given)
    assert not numbers
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
