"""The modules: building, reading the dense weight, and turning back into dense layers."""

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hf_blr import BLRConfig, compress
from hf_blr.calibration.training_form import close_bits, open_bits
from hf_blr.dense import build_dense, dense_weight, feature_sizes, is_dense_linear
from hf_blr.formats import format_named
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.structures import FACTOR, Blast, LowRank, Monarch, Pivoted
from hf_blr.structures.blast.layer import BlastLinear
from hf_blr.structures.low_rank.layer import LowRankLinear
from hf_blr.structures.monarch.layer import MonarchLinear
from hf_blr.structures.pivoted.layer import PivotedLinear

SPECS = [LowRank(12, 8, 3), Monarch(12, 8, 1, (3, 4)), Blast(12, 8, 4, (3, 4)), Pivoted(12, 8, 3)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.structure)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_module_equals_its_dense_form(spec, transposed, bias):
    torch.manual_seed(0)
    module = BLRLinear.from_spec(spec, bias=bias, transposed=transposed, dtype=torch.float64)
    if bias:
        nn.init.normal_(module.bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    dense = module.to_dense()
    assert type(dense) is (Conv1D if transposed else nn.Linear)
    torch.testing.assert_close(dense(x), module(x))
    torch.testing.assert_close(dense.weight.detach(), module.weight.detach())
    assert module.num_parameters == spec.num_parameters + (8 if bias else 0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.structure)
def test_fresh_factors_have_the_variance_of_a_fresh_linear(spec):
    big = type(spec)(240, 320, 40, (1, 1) if isinstance(spec, (LowRank, Pivoted)) else (4, 8))
    torch.manual_seed(0)
    weight = BLRLinear.from_spec(big).weight
    assert weight.std().item() == pytest.approx((3 * 240) ** -0.5, rel=0.15)


def test_from_spec_picks_the_class_and_constructors_check_it():
    assert [type(BLRLinear.from_spec(s)) for s in SPECS] == [LowRankLinear, MonarchLinear, BlastLinear, PivotedLinear]
    with pytest.raises(TypeError, match="needs a Blast spec"):
        BlastLinear(SPECS[0])


def test_from_factors_refuses_wrong_shapes():
    spec = SPECS[2]
    factors = {name: torch.zeros(shape) for name, shape in spec.shapes(FACTOR).items()}
    with pytest.raises(ValueError, match="must have the shapes"):
        BlastLinear.from_factors(spec, {**factors, "s": torch.zeros(3, 4, 4)})
    with pytest.raises(ValueError, match="must have the shapes"):
        BlastLinear.from_factors(spec, {k: v for k, v in factors.items() if k != "s"})


def test_weight_is_read_only_and_marked_as_initialised():
    module = BLRLinear.from_spec(SPECS[0])
    assert module.weight._is_hf_initialized
    with torch.no_grad():
        assert not module.weight.requires_grad
    with pytest.raises((AttributeError, KeyError)):
        module.weight = nn.Parameter(torch.zeros(8, 12))
    assert set(module.state_dict()) == {"u", "v", "bias"}


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.structure)
def test_what_is_computed_from_the_weight_trains_the_factors(spec, transposed):
    torch.manual_seed(0)
    module, x = BLRLinear.from_spec(spec, bias=False, transposed=transposed), torch.randn(5, 12)
    factors = list(module.factors().values())
    wanted = torch.autograd.grad(module(x).square().sum(), factors)
    weight = module.weight
    out = x @ (weight if transposed else weight.T)
    assert type(out) is torch.Tensor
    for got, exact in zip(torch.autograd.grad(out.square().sum(), factors), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


WRITES = {
    "in place": lambda w: w.add_(2),
    "by torch.nn.init": nn.init.normal_,
    "by numbers of its own": lambda w: w.mul_(torch.arange(12.0)),
    "turned": lambda w: w.mul_(-1),
    "operator": lambda w: w.__iadd__(1),
    "item": lambda w: w.__setitem__(0, 0.0),
    "data": lambda w: setattr(w, "data", torch.zeros(8, 12)),
    "in its data": lambda w: w.data.add_(1),
    "detached": lambda w: w.detach().copy_(torch.zeros(8, 12)),
    "row": lambda w: w[1].zero_(),
    "transposed": lambda w: w.T.div_(2),
    "out": lambda w: torch.mul(w, 2, out=w),
    "init": nn.init.zeros_,
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_the_weight_fails_clearly(write):
    module = BLRLinear.from_spec(SPECS[0])
    with torch.no_grad(), pytest.raises(RuntimeError, match="would be lost; change the factors"):
        WRITES[write](module.weight)


SCALINGS = {
    "multiplied": (lambda w: w.mul_(4), 4),
    "divided": (lambda w: w.div_(8), 1 / 8),
    "by an operator": (lambda w: w.__itruediv__(2.0), 1 / 2),
}


@pytest.mark.parametrize("storage", ["plain", "int8", "fp8"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.structure)
@pytest.mark.parametrize("how", SCALINGS)
def test_a_number_by_which_the_weight_is_multiplied_reaches_the_layer(how, spec, storage):
    module, x = BLRLinear.from_spec(spec, bias=False, storage=format_named(storage)), torch.randn(5, spec.in_features)
    act, number = SCALINGS[how]
    with torch.no_grad():
        weight, out = module.weight, module(x)
        before = weight.clone()
        act(weight)
        torch.testing.assert_close(torch.Tensor(weight), number * torch.Tensor(before))
        torch.testing.assert_close(torch.Tensor(module.weight), number * torch.Tensor(before))
        torch.testing.assert_close(module(x), number * out)
        if storage != "plain":
            open_bits(module, "scales")
            act(module.weight)
            torch.testing.assert_close(module(x), number**2 * out)
            close_bits(module)
            torch.testing.assert_close(module(x), number**2 * out)


def test_the_weight_can_be_read_in_compiled_code():
    module, x = BLRLinear.from_spec(SPECS[0]), torch.randn(5, 12)
    compiled = torch.compile(lambda x: x @ module.weight.T, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x) - module.bias)


def test_low_precision_module_multiplies_its_dense_form_out_in_float32():
    torch.manual_seed(0)
    module = BLRLinear.from_spec(LowRank(64, 64, 32), bias=False, dtype=torch.bfloat16)
    exact = module.u.double() @ module.v.double()
    error = (module.to_dense().weight.double() - exact).norm() / exact.norm()
    assert error < 0.5 * torch.finfo(torch.bfloat16).eps


def test_repr_names_what_a_reader_wants():
    text = repr(BLRLinear.from_spec(SPECS[2]))
    assert all(part in text for part in ("BlastLinear", "rank=4", "num_blocks=(3, 4)", "ratio="))


def test_dense_layers_are_told_from_subclasses_and_read_alike():
    class Named(nn.Linear):
        """Adds a name only."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Routing(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    for layer in (nn.Linear(2, 3), Conv1D(3, 2), Named(2, 3), Named(2, 3, bias=False), FalconLinear(2, 3)):
        assert is_dense_linear(layer)
    with torch.device("meta"):
        assert is_dense_linear(FalconLinear(2, 3))
    in_attention = nn.MultiheadAttention(4, 2).out_proj
    packed = Named(2, 3)
    packed.scale = nn.Parameter(torch.ones(3))
    for other in (Scaled(2, 3), Routing(2, 3), packed, in_attention, nn.Bilinear(2, 2, 2)):
        assert not is_dense_linear(other)
    weight, bias = torch.randn(3, 2), torch.randn(3)
    for transposed in (False, True):
        module = build_dense(weight, bias, transposed)
        assert feature_sizes(module) == (2, 3)
        assert torch.equal(dense_weight(module), weight)
        torch.testing.assert_close(module(torch.eye(2)), weight.T + bias)


@pytest.mark.parametrize("family", ["mamba", "wavlm"])
def test_models_that_read_the_weight_themselves_train_it(family):
    from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

    torch.manual_seed(0)
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, time_step_rank=8))
        inputs, names = {"input_ids": torch.randint(0, 64, (2, 6))}, ["dt_proj"]
    else:
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
        convolutions = dict(conv_dim=(16,), conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4)
        groups = dict(num_conv_pos_embedding_groups=2, mask_time_prob=0.0)
        model = WavLMModel(WavLMConfig(**sizes, **convolutions, **groups))
        inputs, names = {"input_values": torch.randn(1, 64)}, ["q_proj", "k_proj", "v_proj", "out_proj"]
    compress(model, BLRConfig("low_rank", ratio=0.5, target_modules=names), progress=False)
    model(**inputs)[0].square().sum().backward()
    factors = [factor for module in blr_modules(model).values() for factor in module.factors().values()]
    assert len(factors) == 2 * len(names) and all(factor.grad.any() for factor in factors)
