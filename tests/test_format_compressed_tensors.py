"""The library whose layout factors in bits have reads them: `compressed-tensors`, where it is installed."""

import pytest
import torch

from hf_blr import BLRLinear
from hf_blr.formats import format_named
from hf_blr.structures import Blast, Dense, LowRank, Monarch, Pivoted

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor, decompress_module  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus  # noqa: E402

SPECS = [
    LowRank(64, 96, 32),
    Pivoted(96, 64, 32),
    Monarch(64, 96, 16, (2, 2)),
    Blast(64, 96, 32, (2, 3)),
    Dense(64, 96, 64),
]
#: also rows that end inside a word
ODD = [LowRank(50, 30, 13), Blast(26, 30, 7, (2, 3)), Dense(50, 30, 30)]
FORMATS = [(name, group) for name in ("int8", "int4", "int3", "int2") for group in (None, 16)] + [("fp8", None)]


def scheme_of(storage):
    integer = storage.name != "fp8"
    arguments = QuantizationArgs(
        num_bits=storage.bits,
        type="int" if integer else "float",
        symmetric=True,
        strategy="channel" if storage.group_size is None else "group",
        group_size=storage.group_size,
    )
    layout = "pack-quantized" if integer else "float-quantized"
    return QuantizationScheme(targets=["Linear"], weights=arguments, format=layout), layout


def layers():
    for spec in (*SPECS, *ODD):
        for name, group in FORMATS:
            if spec not in ODD or group is None:
                yield pytest.param(spec, format_named(name, group), id=f"{spec.structure}-{spec.rank}-{name}-{group}")


@pytest.mark.parametrize("spec, storage", layers())
def test_it_reads_each_factor_and_writes_the_same(spec, storage):
    module = BLRLinear.from_spec(spec, storage=storage, bias=False, dtype=torch.bfloat16)
    scheme, layout = scheme_of(storage)
    library = BaseCompressor.get_value_from_registry(layout)
    factors = module.tensors()
    assert storage.in_bits(spec)
    for name in storage.in_bits(spec):
        # as its functions on a file of a module's tensors do
        parts = {key.removeprefix(f"{name}."): t for key, t in module.stored().items() if key.startswith(f"{name}.")}
        weight = library.decompress(dict(parts), scheme)["weight"]
        assert torch.equal(weight, factors[name])
        # in float32, where the products of codes and scales are exact
        exact = {"weight": module.tensors(torch.float32)[name], "weight_scale": parts["weight_scale"]}
        again = library.compress(exact, scheme)
        assert {key: (t.dtype, t.shape) for key, t in again.items()} == {
            key: (t.dtype, t.shape) for key, t in parts.items()
        }
        for key, part in parts.items():
            assert torch.equal(again[key].float(), part.float()), key


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_it_decompresses_a_factor_in_place(name):
    storage, spec = format_named(name), Blast(64, 96, 32, (2, 3))
    module = BLRLinear.from_spec(spec, storage=storage, dtype=torch.bfloat16)
    factor = module.tensors()["u"]
    module.u.quantization_scheme, layout = scheme_of(storage)
    module.u.quantization_status = QuantizationStatus.COMPRESSED
    decompress_module(module.u, layout)
    assert torch.equal(module.u.weight, factor)
