"""Layers whose factors are kept in bits: the reference forward, dtypes, copies, compilers, adapters."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import hf_blr
from hf_blr import BLRLinear, ops
from hf_blr.formats import PLAIN, Codes, FactorInBits, format_named
from hf_blr.structures import Blast, Dense, LowRank, Monarch, Pivoted

SPECS = {
    spec.structure: spec
    for spec in (
        LowRank(32, 48, 16),
        Pivoted(32, 48, 16),
        Monarch(32, 48, 8, (2, 2)),
        Blast(32, 48, 16, (2, 2)),
        Dense(32, 48, 32),
    )
}
FORMATS = {
    name: format_named(*arguments)
    for name, arguments in {
        "int8": ("int8",),
        "int4": ("int4", 16),
        "int3": ("int3",),
        "int2": ("int2", 8),
        "fp8": ("fp8",),
    }.items()
}


def layer(structure="blast", storage="int4", dtype=torch.float32, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BLRLinear.from_spec(SPECS[structure], storage=FORMATS[storage], dtype=dtype, **kw)


def inputs(*lead, dtype=torch.float32):
    return torch.randn(*lead, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=SPECS)
def structure(request):
    return request.param


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("impl", ["auto", "reference", "dense"])
def test_forward_is_that_of_the_dense_matrix(structure, storage, impl):
    module, x = layer(structure, storage), inputs(2, 3)
    module.impl = impl
    nn.init.normal_(module.bias)
    torch.testing.assert_close(module(x), x @ module.dense_weight().T + module.bias, rtol=1e-4, atol=1e-5)
    assert module(x[0, 0]).shape == (48,)
    # the matrix is the one that the bits say, and not what they were rounded from
    assert {name for name, _ in module.named_children()} == set(FORMATS[storage].in_bits(module.spec))
    for name, part in module.named_children():
        codes = FORMATS[storage].codes(part.parts(), part.shape)
        assert torch.equal(module.tensors()[name], codes.numbers(torch.float32))


@pytest.mark.parametrize("storage", FORMATS)
def test_a_fit_is_rounded_as_its_format_says(structure, storage):
    spec, plain = SPECS[structure], layer(structure)
    factors = {name: part for name, part in plain.tensors().items()}
    rounded = BLRLinear.from_fit(spec, factors, nn.Linear(32, 48), FORMATS[storage])
    for name, part in rounded.tensors().items():
        if name in FORMATS[storage].in_bits(spec):
            assert torch.equal(part, FORMATS[storage].nearest(factors[name]).numbers(torch.float32))
        else:
            assert torch.equal(part, factors[name])
    taken = {
        name: FORMATS[storage].nearest(part) if name in FORMATS[storage].in_bits(spec) else part
        for name, part in factors.items()
    }
    assert any(isinstance(part, Codes) for part in taken.values())
    handed = BLRLinear.from_fit(spec, taken, nn.Linear(32, 48), FORMATS[storage])
    assert all(
        torch.equal(a.float(), b.float())
        for a, b in zip(handed.stored().values(), rounded.stored().values(), strict=True)
    )


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_changes_numbers_and_no_bits(structure, storage, cast):
    module = layer(structure, storage, torch.float32)
    before = {key: (value.dtype, value.clone()) for key, value in module.stored().items()}
    module.to(cast)
    assert module.dtype == module.bias.dtype == cast
    for key, value in module.stored().items():
        dtype, old = before[key]
        if "." in key:
            assert value.dtype == dtype and torch.equal(value.view(torch.uint8), old.view(torch.uint8)), key
        elif value.is_floating_point():
            assert value.dtype == cast
    assert module(inputs(3, dtype=cast)).dtype == cast
    assert module.to_dense().weight.dtype == cast
    module.float()
    assert module.dtype == torch.float32


def test_moves_reach_the_bits(structure):
    module = layer(structure).to("meta")
    assert {t.device.type for t in module.stored().values()} == {"meta"} and module.device.type == "meta"
    module.to_empty(device="cpu")
    assert module.device.type == "cpu"
    assert layer(structure).share_memory().device.type == "cpu"


@pytest.mark.parametrize("storage", FORMATS)
def test_copies_and_pickles(structure, storage):
    module, x = layer(structure, storage, torch.bfloat16), inputs(3, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), module(x)) and other.storage == module.storage and other.dtype == module.dtype
        assert not any(p.requires_grad for name, p in other.named_parameters() if "." in name)
    copies[0].load_state_dict(module.state_dict())


def test_gradients_pass_through_and_bits_do_not_train(structure):
    module, x = layer(structure), inputs(3).requires_grad_()
    module(x).square().sum().backward()
    expected = torch.autograd.grad((x @ module.dense_weight().T + module.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {"bias"} | set(module.factors())
    assert set(module.factors()) == ({"s"} if structure == "blast" else set())


@pytest.mark.parametrize(
    "structure, storage",
    [(structure, "int4") for structure in SPECS] + [("blast", storage) for storage in FORMATS if storage != "int4"],
)
def test_compiles_whole_and_exports_with_any_number_of_tokens(structure, storage):
    module, x = layer(structure, storage).eval(), inputs(5)
    # the limit of recompilations is that of a process
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},)).module()
    for count in (5, 9):
        torch.testing.assert_close(exported(inputs(count)), module(inputs(count)))


def test_autocast_asks_for_its_own_dtype(structure):
    module, x = layer(structure), inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        tensors = list(module.tensors(torch.bfloat16).values())
        assert torch.equal(module(x), ops.linear(structure, x, tensors, module.bias))


@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "monarch", "dense"])
def test_numbers_have_the_dtype_of_the_inputs(structure):
    module, x = layer(structure, dtype=torch.bfloat16, bias=False), inputs(3)
    assert module.dtype == torch.bfloat16 and module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), x @ module.dense_weight(torch.float32).T, rtol=1e-4, atol=1e-5)


def test_kernels_asked_for_by_name_run_on_the_numbers(structure):
    module, x = layer(structure), inputs(32)
    module.impl = "triton"
    if structure == "dense":
        with pytest.raises(RuntimeError, match="dense has no kernels"):
            module(x)
        return
    tensors = list(module.tensors().values())
    assert torch.equal(module(x), ops.linear(structure, x, tensors, module.bias, "triton"))


def test_dense_again(structure):
    module = layer(structure, transposed=True)
    dense = module.to_dense()
    assert type(dense).__name__ == "Conv1D" and dense.weight.requires_grad
    torch.testing.assert_close(dense(inputs(3)), module(inputs(3)), rtol=1e-4, atol=1e-5)


def test_it_says_what_it_is(structure):
    module = layer(structure)
    assert "storage=int4" in repr(module)
    assert module.num_parameters == module.spec.num_parameters + 48
    assert torch.equal(module.weight, module.dense_weight())
    assert all(isinstance(child, FactorInBits) for child in module.children())


def test_fuse_knows_a_plain_copy():
    plain = nn.Module()
    plain.q_proj, plain.k_proj = (BLRLinear.from_spec(SPECS["blast"]) for _ in range(2))
    plain = copy.deepcopy(plain)
    assert plain.q_proj.storage == PLAIN
    hf_blr.fuse(plain)
    assert plain.q_proj.group is not None


def test_adapters_train_beside_bits():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(48, 2))
    peft_model = get_peft_model(model, LoraConfig(target_modules=hf_blr.lora_targets(model), r=2))
    before = [value.clone() for value in model[0].base_layer.stored().values()]
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    first = peft_model(inputs(8)).square().mean()
    first.backward()
    optimizer.step()
    assert peft_model(inputs(8)).square().mean() < first
    after = model[0].base_layer.stored().values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
