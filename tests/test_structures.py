"""Sizes, budgets and their errors: arithmetic only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_blr.structures import (
    FACTOR,
    Blast,
    LowRank,
    Monarch,
    Pivoted,
    make_spec,
    max_rank,
    spec_from_dict,
    structures,
    whole_structures,
)


@pytest.mark.parametrize(
    "spec, shapes, parameters",
    [
        (LowRank(6, 10, 3), {"u": (10, 3), "v": (3, 6)}, 48),
        (Pivoted(6, 10, 3), {"u": (10, 3), "c": (3, 3)}, 45),
        (Monarch(6, 10, 2, (3, 5)), {"u": (5, 2, 6), "v": (3, 10, 2)}, 120),
        (Blast(6, 10, 4, (3, 5)), {"u": (5, 2, 4), "s": (5, 3, 4), "v": (3, 4, 2)}, 124),
    ],
)
def test_shapes_and_parameter_counts(spec, shapes, parameters):
    assert spec.shapes(FACTOR) == shapes
    assert spec.num_parameters == parameters


@pytest.mark.parametrize("structure, rank", [("low_rank", 1024), ("monarch", 64), ("blast", 1008)])
def test_half_of_a_llama_attention_layer_gives_the_published_ranks(structure, rank):
    # low-rank r=1024; Monarch r=1024 is 64 for each of 16 blocks; 16 x 16 BLAST a little below 1024
    blocks = None if structure == "low_rank" else 16
    spec = make_spec(structure, 4096, 4096, ratio=0.5, num_blocks=blocks)
    assert abs(spec.rank - rank) <= 16
    assert spec.ratio <= 0.5


@given(
    structure=st.sampled_from(sorted(structures())),
    p=st.integers(1, 9),
    q=st.integers(1, 9),
    b1=st.integers(1, 5),
    b2=st.integers(1, 5),
    ratio=st.floats(0.05, 0.99),
)
def test_a_ratio_buys_the_largest_rank_that_fits(structure, p, q, b1, b2, ratio):
    blocks = (1, 1) if structure in ("low_rank", "pivoted") else (b1, b2)
    k, n = p * blocks[0], q * blocks[1]
    cls = structures()[structure].spec
    if ratio * k * n < cls.parameters_at(1, k, n, blocks):
        with pytest.raises(ValueError, match="buys no"):
            make_spec(structure, k, n, ratio=ratio, num_blocks=blocks)
        return
    spec = make_spec(structure, k, n, ratio=ratio, num_blocks=blocks)
    assert spec.ratio <= ratio + 1e-9
    if structure != "pivoted" or spec.rank < min(k, n):
        assert cls.parameters_at(spec.rank + 1, k, n, blocks) > ratio * k * n - 1e-6
    assert spec_from_dict(spec.to_dict()) == spec


@given(st.sampled_from(sorted(structures())), st.integers(2, 60), st.integers(2, 60))
def test_max_rank_is_the_last_that_saves_anything(structure, k, n):
    highest = max_rank(structure, k, n, 1)
    with pytest.raises(ValueError, match=r"nothing is saved.*at most " + str(highest)):
        make_spec(structure, k, n, rank=highest + 1, num_blocks=1)
    if highest:
        assert make_spec(structure, k, n, rank=highest, num_blocks=1).ratio < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(structure="blast", in_features=30, out_features=32, ratio=0.5, num_blocks=(4, 4)),
            r"in_features 30.*\[1, 2, 3, 5",
        ),
        (
            dict(structure="blast", in_features=32, out_features=30, ratio=0.5, num_blocks=(4, 4)),
            r"out_features 30.*\[1, 2, 3",
        ),
        (dict(structure="low_rank", in_features=8, out_features=8, rank=1, num_blocks=2), "one block"),
        (dict(structure="pivoted", in_features=8, out_features=8, rank=1, num_blocks=2), "one block"),
        (
            dict(structure="svd", in_features=8, out_features=8, rank=1),
            r"\['blast', 'dense', 'low_rank', 'monarch', 'pivoted'\]",
        ),
        (
            dict(structure="blast", in_features=8, out_features=8, rank=0, num_blocks=2),
            "rank must be an integer of at least 1",
        ),
        (dict(structure="dense", in_features=8, out_features=8, ratio=0.5), "keeps the whole matrix.*leave them out"),
        (dict(structure="blast", in_features=8, out_features=8, num_blocks=2), "exactly one of ratio and rank"),
        (dict(structure="blast", in_features=8, out_features=8, rank=1, num_blocks=(1, 2, 4)), "num_blocks"),
        (dict(structure="blast", in_features=8, out_features=8, rank=1, num_blocks=0), "num_blocks"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**arguments)


def test_the_whole_matrix_is_a_structure_apart():
    spec = make_spec("dense", 12, 8)
    assert spec.rank == 8 and spec.num_parameters == 96 and spec.ratio == 1 and spec.flops(3) == 2 * 3 * 96
    assert spec_from_dict(spec.to_dict()) == spec
    assert "dense" not in structures() and list(whole_structures()) == ["dense"]
    assert max_rank("dense", 12, 8) == 0
    with pytest.raises(ValueError, match="rank 8, got 7"):
        spec_from_dict({**spec.to_dict(), "rank": 7})


def test_spec_from_dict_refuses_other_keys():
    data = LowRank(4, 4, 1).to_dict()
    with pytest.raises(ValueError, match="in_features"):
        spec_from_dict({**data, "colour": 1})
