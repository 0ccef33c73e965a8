"""`fuse` and the activations between projections: who applies them, and that nothing else about a model changes."""

import copy
import io

import pytest
import torch
from fusion_cases import CONFIGS, compressed
from tiny import tiny_bert, tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits, tiny_vit
from torch import nn

import hf_blr
from hf_blr import ops
from hf_blr.config import BLRConfig
from hf_blr.inference.activations import CLASSES, FusedActivation
from hf_blr.integration import blr_modules
from hf_blr.linear import BLRLinear
from hf_blr.structures import LowRank

pytest.importorskip("triton")
#: of one block each, as Triton's interpreter takes its time
MODELS = {
    "gpt2": lambda: tiny_gpt2(n_layer=1),
    "vit": lambda: tiny_vit(num_hidden_layers=1),
    "bert": lambda: tiny_bert(num_hidden_layers=1),
}
#: each structure's kernels once, and each model's names and activation once
PROJECTIONS = [("gpt2", "low_rank"), ("gpt2", "monarch"), ("gpt2", "pivoted"), ("vit", "blast"), ("bert", "low_rank")]
#: how far float32 kernels may be from plain PyTorch
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def few(model):
    """One picture, or three tokens of one text."""
    return {name: value[:1, :3] for name, value in tiny_inputs(model).items()}


def activating(model) -> list[str]:
    return [module.activation for module in blr_modules(model).values() if module.activation]


@pytest.fixture
def applied(monkeypatch):
    """Calls of activations that were not absorbed."""
    calls, forward = [], FusedActivation.forward

    def counted(self, x):
        out = forward(self, x)
        if out is not x:
            calls.append(self)
        return out

    monkeypatch.setattr(FusedActivation, "forward", counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name, structure", PROJECTIONS)
def test_projections_apply_the_activation_behind_them(name, structure, applied):
    model = MODELS[name]()
    hf_blr.compress(model, BLRConfig(**CONFIGS.get(structure, {"structure": structure, "rank": 8})))
    expected, of_few = tiny_logits(model), model(**few(model)).logits.detach()
    groups = hf_blr.fuse(model)
    assert sum(group[-1].rpartition(".")[2].startswith(("act", "intermediate")) for group in groups) == 1
    assert activating(model) == ["gelu_tanh" if name == "gpt2" else "gelu"]
    torch.testing.assert_close(tiny_logits(model), expected)
    with ops.use_impl("triton"), torch.no_grad():
        torch.testing.assert_close(model(**few(model)).logits, of_few, **CLOSE)
    assert not applied


def test_the_model_is_as_before_without(applied):
    model = compressed(build=tiny_gpt2)
    names, state, expected = [n for n, _ in model.named_modules()], model.state_dict(), tiny_logits(model)
    for undo in (hf_blr.unfuse, lambda m: m.train() and m.eval()):
        hf_blr.fuse(model)
        assert activating(model) and model.state_dict().keys() == state.keys()
        undo(model)
        assert not activating(model)
        torch.testing.assert_close(tiny_logits(model), expected)
    # training took the projections' part away, and the activations did theirs
    assert len(applied) == 2
    hf_blr.unfuse(model)
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("between", [lambda m: m, lambda m: m.train() and m.eval(), lambda m: m.double().float()])
def test_fused_again(build, between, applied):
    model = compressed(build=build)
    expected, groups = tiny_logits(model), hf_blr.fuse(model)
    modules = [name for name, _ in model.named_modules()]
    assert hf_blr.fuse(between(model)) == groups and [name for name, _ in model.named_modules()] == modules
    torch.testing.assert_close(tiny_logits(model), expected)
    assert not applied and (build is tiny_llama or activating(model) == ["gelu_tanh"] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("structure", CONFIGS)
def test_gated_mlps(structure):
    model, x = compressed(structure), torch.randn(1, 3, 64)
    mlps = [block.mlp for block in model.model.layers]
    expected, wanted = tiny_logits(model), [mlps[0](given).detach() for given in (x, x[:, :1])]
    groups = hf_blr.fuse(model)
    assert tuple(f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "act_fn")) in groups
    # one class for all, by which compiled code tells blocks apart
    assert len({type(mlp) for mlp in mlps}) == 1 and type(mlps[0]) is not type(tiny_llama().model.layers[0].mlp)
    torch.testing.assert_close(tiny_logits(model), expected)
    with ops.use_impl("triton"), torch.no_grad():
        for given, out in zip((x, x[:, :1]), wanted, strict=True):
            torch.testing.assert_close(mlps[0](given), out, **CLOSE)
    hf_blr.unfuse(model)
    assert type(mlps[0]) is type(tiny_llama().model.layers[0].mlp)


def test_a_gated_mlp_trains(applied):
    model = compressed()
    hf_blr.fuse(model)
    loss = model(**tiny_inputs(model)).logits.square().mean()
    loss.backward()
    wanted = compressed()
    wanted(**tiny_inputs(wanted)).logits.square().mean().backward()
    for name in ("gate_proj", "up_proj"):
        got, expected = (getattr(m.model.layers[0].mlp, name).u.grad for m in (model, wanted))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_copies_stand_on_their_own(build):
    model = compressed(build=build)
    hf_blr.fuse(model)
    clone = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    file.seek(0)
    for other in (clone, torch.load(file, weights_only=False)):
        assert any(hasattr(m, "before_fusion") or isinstance(m, FusedActivation) for m in other.modules())
        torch.testing.assert_close(tiny_logits(other), tiny_logits(compressed(build=build)))


def test_what_replaces_a_projection_brings_the_activation_back():
    model = compressed(build=tiny_gpt2)
    expected = tiny_logits(model)
    hf_blr.fuse(model)
    for block in model.transformer.h:
        block.mlp.c_fc = block.mlp.c_fc.to_dense()
    torch.testing.assert_close(tiny_logits(model), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_comes_before_the_activation():
    peft = pytest.importorskip("peft")
    model = compressed(build=tiny_gpt2)
    expected = tiny_logits(model)
    hf_blr.fuse(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False)).eval()
    assert not activating(model)
    with adapted.disable_adapter():
        torch.testing.assert_close(tiny_logits(adapted), expected)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_equal_blocks_share_one_compilation_without_a_break(build):
    model = compressed("monarch", build)
    hf_blr.fuse(model)
    graphs, x = [], torch.randn(1, 1, 64)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for block in model.model.layers if build is tiny_llama else model.transformer.h:
        with ops.use_impl("triton"), torch.no_grad():
            expected = block.mlp(x)
            block.mlp.compile(fullgraph=True, backend=backend)
            torch.testing.assert_close(block.mlp(x), expected)
    assert len(graphs) == 1


class Parent(nn.Module):
    """fc1 and act by name, with something else between them, or before."""

    def __init__(self, between=None, **kw):
        super().__init__()
        self.fc1 = BLRLinear.from_spec(LowRank(8, 6, 2))
        self.act, self.between = nn.ReLU(), between or (lambda x: x)

    def forward(self, x):
        return self.act(self.between(self.fc1(x)))


def test_a_parent_that_does_something_else_is_left_alone():
    alone = {"same": Parent().eval(), "scaled": Parent(lambda x: x - 1).eval(), "training": Parent()}
    patched = Parent().eval()
    patched.forward = lambda x: x
    unknown = Parent().eval()
    unknown.act = nn.Tanh()
    refusing = Parent(lambda x: 1 / 0).eval()
    for name, parent in (alone | {"patched": patched, "unknown": unknown, "refusing": refusing}).items():
        act = parent.act
        assert hf_blr.fuse(parent) == ([("fc1", "act")] if name == "same" else [])
        assert parent.fc1.activation == ("relu" if name == "same" else "")
        assert name == "same" or parent.act is act


def test_a_projection_applies_one_activation():
    """An attribute of a name that is looked for may stand there unused, before or behind the one that is called."""
    for unused in ("activation_fn", "activation"):
        parent, x = Parent().eval(), torch.randn(3, 8)
        parent.act = nn.SiLU()
        setattr(parent, unused, nn.GELU())
        expected = parent(x).detach()
        assert hf_blr.fuse(parent) == [("fc1", "act")] and parent.fc1.activation == "silu"
        assert type(getattr(parent, unused)) is nn.GELU
        torch.testing.assert_close(parent(x).detach(), expected)


class GELU(nn.Module):
    """As diffusers has it: projection and activation in one, the latter a method."""

    def __init__(self, approximate):
        super().__init__()
        self.proj, self.approximate = BLRLinear.from_spec(LowRank(8, 6, 2)), approximate

    def gelu(self, x):
        return nn.functional.gelu(x, approximate=self.approximate)

    def forward(self, x):
        return self.gelu(self.proj(x))


@pytest.mark.parametrize("approximate, name", [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_an_activation_that_is_a_method(approximate, name):
    module, x = GELU(approximate).eval(), torch.randn(3, 8)
    expected = module(x).detach()
    assert hf_blr.fuse(module) == [("proj", "gelu")] and module.proj.activation == name
    torch.testing.assert_close(module(x).detach(), expected)
    hf_blr.unfuse(module)
    assert "gelu" not in vars(module)
    torch.testing.assert_close(module(x).detach(), expected)


def test_names_of_activations_are_those_of_their_functions():
    from transformers import activations

    x = torch.linspace(-4, 4, 33)
    for name, kind in CLASSES.items():
        cls = getattr(activations, name, None) or getattr(nn, name, None)
        if cls is not None:
            torch.testing.assert_close(cls()(x), ops.activations.activated(x, kind), rtol=1e-5, atol=1e-6)
