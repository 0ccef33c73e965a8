"""Other libraries' dense layers: what they are compared with, and what is said where they are missing."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama
from torch import nn

from hf_blr.bench import cases, layers, rivals, rows, timing
from hf_blr.bench.models import Shape
from hf_blr.bench.rival_layers import RivalLinear, bytes_of
from hf_blr.bench.variants import Variant
from hf_blr.ops.rules.few_tokens import FEW_TOKENS

N, K = 6, 4 * rivals.GROUP


@pytest.fixture
def case():
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    levels, scale, low = rivals.quantised(weight)
    assert levels.min() == 0 and levels.max() == 15
    numbers = (levels * scale + low).flatten(1)
    # half a level off at most
    assert ((weight - numbers).unflatten(1, (-1, rivals.GROUP)).abs() <= 0.501 * scale).all()
    return levels.flatten(1).int(), scale, low, numbers


def test_pytorchs_numbers(case):
    levels, scale, low, numbers = case
    packed = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
    scales = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1)
    x = torch.randn(3, K, dtype=torch.float64)
    torch.testing.assert_close(
        rivals.pytorch_int4_exact(x, None, scales, packed), F.linear(x, numbers.double()), atol=1e-5, rtol=1e-5
    )


def test_gemlites_numbers(case):
    levels, scale, low, numbers = case
    words = sum(levels.T.unflatten(0, (-1, 8))[:, j] << 4 * j for j in range(8))
    x = torch.randn(3, K, dtype=torch.float64)
    found = rivals.gemlite_int4_exact(x, words, scale.squeeze(-1).T, low.squeeze(-1).T, torch.zeros(()))
    torch.testing.assert_close(found, F.linear(x, numbers.double()), atol=1e-5, rtol=1e-5)


def test_gemlites_float8_numbers():
    codes, scales = torch.randn(K, N).to(torch.float8_e4m3fn), torch.rand(N)
    x = torch.randn(3, K, dtype=torch.float64)
    wanted = x @ (codes.double() * scales.double())
    torch.testing.assert_close(rivals.gemlite_float8_exact(x, codes, scales), wanted)


def test_few_rows_go_to_the_kernel_and_many_to_a_product(monkeypatch):
    def make(weight):
        return (lambda x, w: -F.linear(x, w)), [weight], F.linear

    monkeypatch.setitem(rivals.RIVALS["int4"], "fake", make)
    linear = nn.Linear(K, N, bias=False)
    layer = RivalLinear(linear, "int4", "fake")
    for count, sign in ((FEW_TOKENS, -1), (FEW_TOKENS + 1, 1)):
        x = torch.randn(count, K)
        torch.testing.assert_close(layer(x[None]), sign * linear(x[None]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have them all")
def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert rivals.missing("gemlite") == "gemlite is not installed"
    assert "need a GPU" in rivals.missing("PyTorch")
    assert rivals.rivals_of("int4", 1, torch.bfloat16) == {}
    monkeypatch.setattr(rivals.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match="pip install torchao"):
        rivals.quantise_by_torchao(nn.Linear(2, 2), [""])


def test_which_rivals_are_made_for_so_many_tokens(monkeypatch):
    monkeypatch.setattr(rivals, "missing", lambda name: None)

    def names(form, tokens, dtype=torch.bfloat16):
        return set(rivals.rivals_of(form, tokens, dtype))

    assert names("int4", 1) == {"PyTorch", "gemlite"} and not names("int4", 1024)
    assert names("fp8", 1024) == {"torchao"} and not names("plain", 1)
    assert not names("fp8", 1024, torch.float16)


def test_rivals_are_rows_beside_ours_and_their_failures_are_said(monkeypatch, caplog):
    def works(weight):
        return F.linear, [weight], lambda x, w: F.linear(x, w.to(x.dtype))

    def fails(weight):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(layers, "rivals_of", lambda *of: {"works": works, "fails": fails} if of[0] == "int4" else {})
    case = cases.shape_cases([(32, 48)], [], 0.5, [2], [cases.FORWARD], ["low_rank"])[0]
    timer = timing.Timer("cpu", 0.0, 1)
    found = layers.bench_case(case, timer, torch.float32, ["hf_blr"], formats=["plain", "int4"])
    assert [(row["structure"], row["impl"], row["format"]) for row in found if row["structure"] == "dense"] == [
        ("dense", "eager", "plain"),
        ("dense", "works", "int4"),
    ]
    assert {row["dense_int4_us"] for row in found} == {found[1]["us"]} and found[0]["dense_fp8_us"] is None
    assert "fails in int4 is left out: no kernel for this card" in caplog.text


def test_whole_models_by_another_library(monkeypatch):
    def multiply(x, w, _):
        return F.linear(x, w)

    def make(weight):
        return multiply, [weight, torch.zeros(3, dtype=torch.int8)], multiply

    monkeypatch.setitem(rivals.RIVALS["int4"], "fake", make)
    variant = Variant.parse("dense/int4, fake")
    assert str(variant) == "dense/int4, fake" and not variant.keeps_dense
    shape = Shape("text", tiny_llama)
    request = rows.Request(("prefill",), tokens=(5,), batches=(1,), forms=("eager",), dtype=torch.float32)
    (dense, row) = rows.model_rows("tiny", shape, [Variant("dense"), variant], request, timing.Timer("cpu", 0.0, 1))
    assert row["rival"] and "rival" not in dense and row["ms"] > 0
    names = rows.trained_names(shape)
    assert row["parameters"] == dense["parameters"]
    assert row["projection_parameters"] == dense["projection_parameters"]
    assert row["weight_bytes"] == dense["weight_bytes"] + 3 * len(names)


@pytest.mark.parametrize("text", ["dense/int4, torchao", "dense, gemlite", "low_rank/int4, gemlite"])
def test_variants_that_no_library_has(text):
    with pytest.raises(ValueError, match="expected one of dense/int4, PyTorch; dense/int4, gemlite"):
        Variant.parse(text)


def test_bytes_of_tensors_that_hold_tensors():
    class Held:
        codes, scale = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 1)

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    assert bytes_of(Held()) == 32 + 16 and bytes_of(torch.zeros(3, dtype=torch.bfloat16)) == 6
