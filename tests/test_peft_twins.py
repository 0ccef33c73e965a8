"""DoRA, rsLoRA, all-linear, and merging by re-fit: each against PEFT's own layers on the same model made dense."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits, tiny_mixtral
from transformers import AutoModelForCausalLM

import hf_blr
from hf_blr import BLRConfig
from hf_blr.integration import blr_modules, lora_targets
from hf_blr.structures import structures

# PEFT reads an attribute that newer transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


#: and no dropout, which would draw differently in models of different layers
ONE_BLOCK = {
    tiny_llama: {"num_hidden_layers": 1},
    tiny_mixtral: {"num_hidden_layers": 1},
    tiny_gpt2: {"n_layer": 1, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}


def compressed(structure="low_rank", make=tiny_llama, **kw):
    model = make(**ONE_BLOCK[make])
    hf_blr.compress(model, BLRConfig(structure, ratio=0.6, **kw), progress=False)
    return model.double()


def adapted(model, targets, size=0.1, **kw):
    """A PEFT model on these layers whose adapters do something; the same for any model of their names."""
    peft_model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, **kw)).double()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "lora_A" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "magnitude" in name:
            parameter.data = parameter.data * (0.5 + torch.rand(parameter.shape, generator=generator).double())
    return peft_model


def twins(model, targets=None, **kw):
    """The model with adapters, and PEFT's own layers around the same model made dense."""
    targets = targets or lora_targets(model)
    dense = hf_blr.to_dense(copy.deepcopy(model))
    return adapted(model, targets, **kw), adapted(dense, targets, **kw)


def loss_and_gradients(model):
    inputs = tiny_inputs(model)
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names])
    return loss, dict(zip(names, found, strict=True))


ADAPTERS = [("low_rank", "LoRA"), ("blast", "rsLoRA")]
VARIANTS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


@pytest.mark.parametrize("structure, variant", [*((name, "DoRA") for name in structures()), *ADAPTERS])
def test_adapters_compute_what_those_of_the_dense_model_do(structure, variant):
    ours, dense = twins(compressed(structure), **VARIANTS[variant])
    (loss, found), (expected, wanted) = loss_and_gradients(ours), loss_and_gradients(dense)
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys() and any("magnitude" in name for name in found) == (variant == "DoRA")
    torch.testing.assert_close(found, wanted)


def test_dora_of_layers_with_biases_and_a_conv1d():
    ours, dense = twins(compressed(make=tiny_gpt2), use_dora=True, fan_in_fan_out=True)
    torch.testing.assert_close(loss_and_gradients(ours), loss_and_gradients(dense))


def test_dora_with_dropout_drops_the_input_of_both_paths():
    ours, dense = twins(compressed(), use_dora=True, lora_dropout=0.4)
    results = []
    for model in (ours, dense):
        torch.manual_seed(0)
        results.append(loss_and_gradients(model)[0])
    torch.testing.assert_close(*results)


def test_dora_never_multiplies_frozen_factors_out_again(monkeypatch):
    model = adapted(compressed(), ["q_proj"], use_dora=True)
    expected = tiny_logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "dense_weight", lambda *args: pytest.fail("a dense matrix in a forward"))
        assert torch.equal(tiny_logits(model), expected)
    # a factor that trains beside the adapter is seen
    with torch.no_grad():
        layer.u.mul_(2)
    changed = tiny_logits(model)
    fresh = adapted(compressed(), ["q_proj"], use_dora=True)
    with torch.no_grad():
        fresh.base_model.model.model.layers[0].self_attn.q_proj.base_layer.u.mul_(2)
    torch.testing.assert_close(changed, tiny_logits(fresh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_in_few_bits_follows_the_same_adapter_in_float32(dtype):
    model = adapted(compressed("blast"), ["q_proj", "up_proj"], use_dora=True).float()
    expected = tiny_logits(model)
    assert (tiny_logits(model.to(dtype)) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("variant", ["rsLoRA", "DoRA"])
def test_an_adapter_loads_on_the_model_that_was_saved(variant, tmp_path):
    model = compressed("monarch")
    model.save_pretrained(tmp_path / "base")
    peft_model = adapted(model, lora_targets(model), **VARIANTS[variant])
    expected = tiny_logits(peft_model.eval())
    peft_model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(tiny_logits(loaded.double().eval()), expected)


def test_all_linear_means_factors_and_what_is_left_dense():
    model = compressed(modules_to_not_convert=["k_proj"])
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    carriers = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    names = {name for name in peft_model.get_base_model().state_dict() if "self_attn" in name or "mlp" in name}
    assert len(carriers) == 7 and any("k_proj" in name for name in carriers) and names
    assert not any("lm_head" in name for name in carriers)
    # a second adapter finds the same layers, and none inside of them
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A.second" in name} == carriers


def test_all_linear_leaves_experts_alone():
    model = compressed(make=tiny_mixtral)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert not [name for name, _ in model.named_parameters() if "experts" in name and "lora" in name]


def test_refit_takes_an_adapter_in_where_the_rank_has_room():
    # W of rank 4 in factors of rank 8, and an adapter of rank 3
    model = compressed()
    for module in blr_modules(model).values():
        with torch.no_grad():
            module.u[:, 4:] = 0
    ours, dense = twins(model)
    expected = tiny_logits(dense.merge_and_unload())
    merged, refits = hf_blr.merge_adapters(ours, merge="refit")
    assert all(refit.rel_error < 1e-6 < refit.without for refit in refits.values()) and len(refits) == 7
    torch.testing.assert_close(tiny_logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure, variant", [("pivoted", "LoRA"), ("monarch", "rsLoRA"), ("blast", "DoRA")])
def test_refit_says_how_far_it_is_from_the_sum(structure, variant, tmp_path, caplog):
    model = compressed(structure, modules_to_not_convert=["k_proj"])
    targets = [*lora_targets(model), "k_proj"]
    ours, dense = twins(model, targets, size=0.3, **VARIANTS[variant])
    before, exact = copy.deepcopy(ours).unload(), dense.merge_and_unload()
    merged, refits = hf_blr.merge_adapters(ours, merge="refit")
    assert set(refits) == set(blr_modules(merged)) and "6 layers were fitted anew" in caplog.text
    for name, refit in refits.items():
        target, found, old = (m.get_submodule(name).weight.detach() for m in (exact, merged, before))
        assert refit.rel_error == pytest.approx(((found - target).norm() / target.norm()).item(), rel=1e-6)
        assert refit.without == pytest.approx(((old - target).norm() / target.norm()).item(), rel=1e-6)
        assert refit.rel_error < refit.without
    k = "model.layers.0.self_attn.k_proj"
    torch.testing.assert_close(merged.get_submodule(k).weight, exact.get_submodule(k).weight)
    merged.save_pretrained(tmp_path)
    assert torch.equal(tiny_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny_logits(merged))


def test_refit_keeps_the_format_and_takes_biases_in():
    model = compressed(make=tiny_gpt2, factor_format="int8")
    ours, dense = twins(model, lora_bias=True, fan_in_fan_out=True)
    for peft_model in (ours, dense):
        for name, parameter in peft_model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.data.fill_(0.5)
    exact = dense.merge_and_unload()
    merged, refits = hf_blr.merge_adapters(ours, merge="refit")
    for name, module in blr_modules(merged).items():
        assert module.storage.name == "int8" and refits[name].rel_error < refits[name].without
        torch.testing.assert_close(module.bias, exact.get_submodule(name).bias)


def test_merging_is_exact_or_asked_for():
    model = compressed()
    with pytest.raises(NotImplementedError, match=r'cannot be merged exactly.*merge="refit"'):
        hf_blr.merge_adapters(adapted(model, ["q_proj"]))
    with pytest.raises(ValueError, match='must be "exact" or "refit", got \'approximately\''):
        hf_blr.merge_adapters(model, merge="approximately")
    with pytest.raises(TypeError, match="LlamaForCausalLM carries no adapters to merge: give what peft"):
        hf_blr.merge_adapters(model, merge="refit")
    dense = adapted(tiny_llama().double(), ["q_proj"])
    expected = tiny_logits(dense)
    merged, refits = hf_blr.merge_adapters(dense)
    assert refits == {} and torch.allclose(tiny_logits(merged), expected)
