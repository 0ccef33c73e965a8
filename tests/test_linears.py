"""`to_linears`: the same model in plain PyTorch, exported with any number of texts and tokens."""

import copy

import pytest
import torch
import transformers
from expert_cases import gpt_oss, llama4
from packaging.version import Version
from tiny import batches_for, tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits, tiny_mixtral, tiny_vit
from torch import nn

import hf_blr
from hf_blr import BLRConfig
from hf_blr.experts import ExpertsLinear, PlainExperts
from hf_blr.integration import blr_modules
from hf_blr.integration.linears import plain_form
from hf_blr.structures import structures

#: of a block of Llama, each structure at least once
ALL = {"q_proj": "low_rank", "o_proj": "low_rank", "k_proj": "pivoted", "up_proj": "pivoted", "v_proj": "monarch"}


def compressed(make=tiny_llama, config=None, **kw):
    model = make(**kw)
    config = config or BLRConfig(
        "blast",
        ratio=0.6,
        allocation="uniform",
        overrides={name: {"structure": structure} for name, structure in ALL.items()},
    )
    hf_blr.compress(model, config, calibration=batches_for(model), progress=False)
    return model


def test_layers_become_plain_modules_of_the_same_size():
    model = compressed(num_hidden_layers=1)
    sizes = {name: module.num_parameters for name, module in blr_modules(model).items()}
    specs = {name: module.spec for name, module in blr_modules(model).items()}
    expected = tiny_logits(model)
    assert hf_blr.to_linears(model) is model and not blr_modules(model)
    torch.testing.assert_close(tiny_logits(model), expected, rtol=1e-5, atol=1e-5)
    for name, spec in specs.items():
        module = model.get_submodule(name)
        held = sum(p.numel() for p in module.parameters())
        if spec.structure in ("low_rank", "pivoted"):
            assert [type(part) for part in module] == [nn.Linear, nn.Linear]
            assert (module[0].in_features, module[0].out_features) == (spec.in_features, spec.rank)
            assert held == spec.rank * (spec.in_features + spec.out_features)
        else:
            assert held == sizes[name]
    assert {spec.structure for spec in specs.values()} == set(structures())


@pytest.mark.parametrize("structure", structures())
def test_a_model_that_reads_weights_finds_them(structure):
    layer = compressed(config=BLRConfig(structure, ratio=0.6), num_hidden_layers=1).model.layers[0].self_attn.q_proj
    plain = plain_form(layer)
    torch.testing.assert_close(plain.weight, layer.dense_weight(), rtol=1e-5, atol=1e-6)
    assert plain.bias is None and (plain.in_features, plain.out_features) == (64, 64)


@pytest.mark.parametrize("make, structure", [(tiny_gpt2, "low_rank"), (tiny_gpt2, "monarch"), (tiny_vit, "blast")])
def test_outputs_differ_by_rounding_alone(make, structure):
    model = compressed(make, BLRConfig(structure, ratio=0.6))
    expected = tiny_logits(model)
    torch.testing.assert_close(tiny_logits(hf_blr.to_linears(model)), expected, rtol=1e-5, atol=1e-5)


def test_factors_in_bits_become_numbers():
    config = BLRConfig("low_rank", ratio=0.6, factor_format="int4", dense_format="int8", group_size=None, seed=1)
    config.overrides = {"o_proj": {"structure": "dense"}}
    model = compressed(config=config)
    expected = tiny_logits(model)
    hf_blr.to_linears(model)
    torch.testing.assert_close(tiny_logits(model), expected, rtol=1e-5, atol=1e-5)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())


def test_what_trains_still_trains():
    model = compressed()
    layer = model.model.layers[0].self_attn
    for factor in layer.q_proj.factors().values():
        factor.requires_grad_(False)
    hf_blr.to_linears(model.train())
    assert [p.requires_grad for p in layer.q_proj.parameters()] == [False, False] and layer.q_proj.training
    model(**tiny_inputs(model), labels=tiny_inputs(model)["input_ids"]).loss.backward()
    assert layer.k_proj[0].weight.grad.any() and model.model.layers[0].mlp.down_proj.s.grad.any()


SHAPES = {"input_ids": {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=128)}, "use_cache": None}


@pytest.fixture(scope="module", params=["all structures", "experts"])
def exportable(request):
    """A compressed model in plain PyTorch, and the arguments that it is exported with."""
    if request.param == "experts":
        model = compressed(tiny_mixtral, BLRConfig("low_rank", ratio=0.6), num_hidden_layers=1)
    else:
        model = compressed(num_hidden_layers=1)
    model = hf_blr.to_linears(model)
    return model.requires_grad_(False), {"input_ids": tiny_inputs(model)["input_ids"], "use_cache": False}


def test_an_exported_model_takes_any_number_of_tokens(exportable):
    model, inputs = exportable
    exported = torch.export.export(model, (), inputs, dynamic_shapes=SHAPES, strict=False)
    assert not [node.target for node in exported.graph.nodes if "hf_blr" in str(node.target)]
    for shape in ((2, 12), (3, 31), (5, 8)):
        ids = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.slow
def test_an_onnx_file_takes_any_number_of_tokens(exportable, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = exportable
    torch.onnx.export(
        model, (), tmp_path / "model.onnx", kwargs=inputs, dynamic_shapes=SHAPES, dynamo=True, verbose=False
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 12), (3, 31)):
        ids = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2))
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.4"), reason="this release overwrites the notice")
def test_what_is_saved_of_it_is_refused_by_every_load(exportable, tmp_path):
    exportable[0].save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    with pytest.raises(ValueError, match="to_linears made this model to be exported; save the compressed model"):
        type(exportable[0]).from_pretrained(tmp_path)


@pytest.mark.parametrize("structure", structures())
def test_experts_become_products_of_rows(structure):
    bits = {"factor_format": "int8"} if structure == "blast" else {}
    model = tiny_mixtral(num_hidden_layers=1)
    hf_blr.compress(model, BLRConfig(structure, ratio=0.6, fit_rounds=1, **bits), progress=False)
    expected = tiny_logits(model)
    hf_blr.to_linears(model)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, PlainExperts)
    torch.testing.assert_close(tiny_logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [gpt_oss, llama4])
def test_experts_of_other_conventions_become_products_of_rows_too(make):
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):
            torch.nn.init.normal_(parameter)
    # of one tensor the matrices stay dense
    config = BLRConfig("low_rank", ratio=0.6, target_modules=["gate_up_proj", "q_proj"])
    hf_blr.compress(model, config, progress=False)
    expected = tiny_logits(model)
    hf_blr.to_linears(model)
    torch.testing.assert_close(tiny_logits(model), expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_plain_form_is_refused_before_anything_changes(monkeypatch):
    model = tiny_mixtral(num_hidden_layers=1)
    hf_blr.compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(ExpertsLinear, "alone", True)
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.experts.\w+_proj: low_rank runs one expert after the"):
        hf_blr.to_linears(model)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="has no BLR modules"):
        hf_blr.to_linears(tiny_llama())
