"""Rows and columns of a matrix as layers of their own."""

import pytest
import torch

from hf_blr.formats import PLAIN, format_named
from hf_blr.formats.pieces import tensors_of
from hf_blr.linear import BLRLinear
from hf_blr.structures import Blast, Dense, LowRank, Monarch, Pivoted

K, N = 96, 64
SPECS = [
    LowRank(K, N, 16),
    Pivoted(K, N, 16),
    Monarch(K, N, 8, (2, 4)),
    Blast(K, N, 16, (4, 2)),
    Dense(K, N, 64),
]
FORMATS = [PLAIN, format_named("int3"), format_named("int4", 4), format_named("fp8")]


def layer_of(spec, storage):
    torch.manual_seed(0)
    layer = BLRLinear.from_spec(spec, bias=False, dtype=torch.float64, storage=storage)
    if "order" in layer.indices():
        layer.order.copy_(torch.randperm(spec.in_features))
    return layer


def part_of(layer, piece):
    """The layer of a piece, from the stored tensors of the whole."""
    stored, spec = layer.stored(), layer.spec
    cut = {}
    for name in spec.names():
        own = {key: tensor.detach() for key, tensor in stored.items() if key.partition(".")[0] == name}
        cut |= tensors_of(layer.storage, spec, piece, name, own)
    return BLRLinear.from_factors(piece.spec, cut, storage=layer.storage, dtype=layer.dtype)


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.structure)
@pytest.mark.parametrize("side", ["outputs", "inputs"])
# fewer devices than blocks, as many, and more
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_pieces_are_the_rows_and_columns_of_the_matrix(spec, storage, side, devices):
    if spec.structure == "pivoted" and side == "inputs":
        with pytest.raises(ValueError, match="pivoted layers cannot be split by inputs"):
            spec.inputs(0, K // devices)
        return
    layer = layer_of(spec, storage)
    dense = layer.dense_weight()
    size = (N if side == "outputs" else K) // devices
    for device in range(devices):
        here = slice(device * size, (device + 1) * size)
        part = part_of(layer, getattr(spec, side)(here.start, here.stop))
        torch.testing.assert_close(part.dense_weight(), dense[here] if side == "outputs" else dense[:, here])


@pytest.mark.parametrize("spec", [Monarch(K, N, 8, (3, 4)), Blast(K, N, 16, (3, 4))], ids=lambda spec: spec.structure)
def test_blocks_are_not_cut_through(spec):
    with pytest.raises(ValueError, match=r"features 0 to 48 of 96 are neither whole blocks.*3 blocks of 32.*divides 3"):
        spec.inputs(0, 48)
    assert spec.outputs(16, 48).spec.num_blocks == (3, 2)


def test_groups_are_not_cut_through():
    spec, storage = LowRank(K, N, 16), format_named("int4", 16)
    layer = layer_of(spec, storage)
    with pytest.raises(ValueError, match=r"numbers 0 to 24 of the rows of v cut through groups of 16.*fewer devices"):
        part_of(layer, spec.inputs(0, 24))


def test_a_piece_stores_less_than_the_whole():
    # of Monarch, both factors are divided; of the others, one
    spec = Monarch(K, N, 8, (2, 4))
    assert spec.outputs(0, N // 2).spec.num_parameters == spec.num_parameters // 2
    assert spec.inputs(0, K // 2).spec.num_parameters == spec.num_parameters // 2
    assert LowRank(K, N, 16).outputs(0, N // 2).spec.num_parameters == 16 * (K + N // 2)
