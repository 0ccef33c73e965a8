"""What each structure stores: shapes, parameter counts, arithmetic, and the rank that a budget buys.

Letters, used everywhere in the package: `T` tokens, `K` in features, `N` out features, `B1` / `B2` input / output
blocks, `P = K / B1`, `Q = N / B2`, `R` rank. All structures project each input block (`v`), mix, and expand
each output block (`u`); they differ in the mix, and "pivoted" in how it stores the projection. No torch in this file:
it is arithmetic on sizes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class BLRSpec:
    """The sizes of one block low-rank matrix of `out_features x in_features`.

    Args:
        in_features: K.
        out_features: N.
        rank: R. For Monarch it is the rank of each of the B1 x B2 block pairs.
        num_blocks: (B1, B2), blocks of the input and of the output features.

    Raises:
        ValueError: if a size is not positive, or blocks do not divide the features.
    """

    in_features: int
    out_features: int
    rank: int
    num_blocks: tuple[int, int] = (1, 1)

    structure: ClassVar[str]
    #: (B1, B2) when the user names none
    default_blocks: ClassVar[tuple[int, int]] = (1, 1)
    #: the state-dict keys, in the order in which the ops take them
    factor_names: ClassVar[tuple[str, ...]] = ("u", "v")
    #: buffers of integers that the ops take after the factors
    index_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        object.__setattr__(self, "num_blocks", as_block_pair(self.num_blocks))
        for name in ("in_features", "out_features", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        sides = ("in_features", "out_features")
        for side, size, blocks in zip(sides, (self.in_features, self.out_features), self.num_blocks, strict=True):
            if size % blocks:
                raise ValueError(f"{side} {size} is not divisible by {blocks} blocks; choose from {divisors(size)}")

    @property
    def block_shape(self) -> tuple[int, int]:
        """(P, Q): features in one input block and in one output block."""
        return self.in_features // self.num_blocks[0], self.out_features // self.num_blocks[1]

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def num_parameters(self) -> int:
        """Numbers stored in the factors and indices; a bias is not counted."""
        return self.parameters_at(self.rank, self.in_features, self.out_features, self.num_blocks)

    @property
    def equivalent_rank(self) -> float:
        """The rank of a low-rank matrix that is taken to be as accurate: that with as many parameters."""
        return self.num_parameters / (self.in_features + self.out_features)

    @property
    def ratio(self) -> float:
        """Kept / dense parameters."""
        return self.num_parameters / self.dense_parameters

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """{state-dict key: shape}, in the order of `factor_names`."""
        raise NotImplementedError

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """{state-dict key: shape}, in the order of `index_names`."""
        return {}

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward over `tokens` rows, a multiply-add as two."""
        raise NotImplementedError

    @classmethod
    def parameters_at(cls, rank: int, in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        """Numbers stored at a rank; rises with it."""
        return rank * cls.parameters_per_rank(in_features, out_features, num_blocks)

    @classmethod
    def rank_within(cls, parameters: int, in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        """The largest rank that stores at most so many numbers; 0 if there is none."""
        return max(0, parameters) // cls.parameters_per_rank(in_features, out_features, num_blocks)

    @staticmethod
    def parameters_per_rank(in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        """What each rank stores, where that is the same for all of them."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """A JSON-ready form that `spec_from_dict` reads back."""
        return {"structure": self.structure, **asdict(self), "num_blocks": list(self.num_blocks)}


class LowRank(BLRSpec):
    """W = u v, with u `[N, R]` and v `[R, K]`. One block on each side."""

    structure = "low_rank"

    def __post_init__(self):
        super().__post_init__()
        if self.num_blocks != (1, 1):
            raise ValueError(f"low_rank has one block, got num_blocks={self.num_blocks}; leave num_blocks out")

    def factor_shapes(self):
        return {"u": (self.out_features, self.rank), "v": (self.rank, self.in_features)}

    def flops(self, tokens):
        return 2 * tokens * self.num_parameters

    @staticmethod
    def parameters_per_rank(in_features, out_features, num_blocks):
        return in_features + out_features


class Pivoted(BLRSpec):
    """Low-rank without its redundancy: W = u [I c] P, R (N + K - R) numbers for a matrix of rank R.

    u `[N, R]`, c `[R, K - R]`, order `[K]` integers: the first R of the input features in this order pass as they are,
    and c adds the others to them. A pair of factors (u, v) holds R^2 numbers that change nothing, as (u A, A^-1 v) is
    the same matrix; here A makes R columns of v the identity. The form of PIFA (Zhao et al., ICML 2025, PMLR 267),
    with pivots among the inputs. One block on each side.
    """

    structure = "pivoted"
    factor_names = ("u", "c")
    index_names = ("order",)

    def __post_init__(self):
        super().__post_init__()
        if self.num_blocks != (1, 1):
            raise ValueError(f"pivoted has one block, got num_blocks={self.num_blocks}; leave num_blocks out")

    @property
    def equivalent_rank(self):
        return float(self.rank)

    def factor_shapes(self):
        # a rank as large as the matrix has no other features; it stores no less than the dense matrix
        return {"u": (self.out_features, self.rank), "c": (self.rank, max(0, self.in_features - self.rank))}

    def index_shapes(self):
        return {"order": (self.in_features,)}

    def flops(self, tokens):
        return 2 * tokens * (self.num_parameters - self.in_features)

    @classmethod
    def parameters_at(cls, rank, in_features, out_features, num_blocks):
        # beyond the smaller side a rank stores more and says no more
        return rank * (out_features + max(0, in_features - rank)) + in_features

    @classmethod
    def rank_within(cls, parameters, in_features, out_features, num_blocks):
        most, both = parameters - in_features, in_features + out_features
        if most < both - 1:
            return 0
        # the smaller root of R^2 - (N + K) R + most, rounded down; with integers, as floats lose the last digits
        root = both * both - 4 * most
        rank = min(in_features, out_features) if root < 0 else (both - math.isqrt(root)) // 2
        rank = min(rank, in_features, out_features)
        while rank and cls.parameters_at(rank, in_features, out_features, num_blocks) > parameters:
            rank -= 1
        return rank


class Monarch(BLRSpec):
    """Block (i, j) of W is u_ij v_ij, of rank `rank` each (arXiv 2204.00595, with general block rank).

    v `[B1, B2*R, P]`: rows `i*R ... (i+1)*R` of v[j] feed output block i. u `[B2, Q, B1*R]`: columns
    `j*R ... (j+1)*R` of u[i] read input block j. Output blocks are contiguous, so no permutation is left.
    """

    structure = "monarch"
    default_blocks = (4, 4)

    def factor_shapes(self):
        (b1, b2), (p, q) = self.num_blocks, self.block_shape
        return {"u": (b2, q, b1 * self.rank), "v": (b1, b2 * self.rank, p)}

    def flops(self, tokens):
        return 2 * tokens * self.num_parameters

    @staticmethod
    def parameters_per_rank(in_features, out_features, num_blocks):
        return num_blocks[1] * in_features + num_blocks[0] * out_features


class Blast(BLRSpec):
    """Block (i, j) of W is u_i diag(s_ij) v_j (arXiv 2410.21262).

    u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]`. All s equal to one is low-rank; 0/1 patterns in s give Monarch.
    """

    structure = "blast"
    # 4 x 16 keeps most of the accuracy of 16 x 16 with an intermediate a quarter as large
    default_blocks = (4, 16)
    factor_names = ("u", "s", "v")

    def factor_shapes(self):
        (b1, b2), (p, q) = self.num_blocks, self.block_shape
        return {"u": (b2, q, self.rank), "s": (b2, b1, self.rank), "v": (b1, self.rank, p)}

    def flops(self, tokens):
        return 2 * tokens * self.num_parameters

    @staticmethod
    def parameters_per_rank(in_features, out_features, num_blocks):
        return in_features + out_features + num_blocks[0] * num_blocks[1]


STRUCTURES: dict[str, type[BLRSpec]] = {cls.structure: cls for cls in (LowRank, Pivoted, Monarch, Blast)}


def structure_class(structure: str) -> type[BLRSpec]:
    """The spec class of a structure's name. Raises ValueError that lists the names."""
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {sorted(STRUCTURES)}, got {structure!r}")
    return STRUCTURES[structure]


def make_spec(structure, in_features, out_features, *, ratio=None, rank=None, num_blocks=None) -> BLRSpec:
    """A spec from a rank, or from the largest rank whose parameters are at most `ratio` of the dense ones.

    Raises:
        ValueError: if not exactly one of ratio and rank is given, the budget buys no rank at all, or the result
            would hold as many numbers as the dense matrix or more.
    """
    cls = structure_class(structure)
    blocks = as_block_pair(cls.default_blocks if num_blocks is None else num_blocks)
    if (ratio is None) == (rank is None):
        raise ValueError(f"give exactly one of ratio and rank, got ratio={ratio} and rank={rank}")
    dense = in_features * out_features
    if rank is None:
        # the small constant keeps 0.3 * 10 from becoming 2
        rank = cls.rank_within(int(ratio * dense + 1e-6), in_features, out_features, blocks)
        if rank < 1:
            cost = cls.parameters_at(1, in_features, out_features, blocks)
            # blocks that do not divide are the likelier mistake, so let the spec complain about them first
            cls(in_features, out_features, 1, blocks)
            raise ValueError(
                f"ratio={ratio} of {out_features}x{in_features} buys no {structure} rank with {blocks[0]}x{blocks[1]} "
                f"blocks: rank 1 costs {cost} of {dense} parameters; use a ratio of at least {cost / dense:.3f}, "
                "fewer blocks, or leave this module dense"
            )
    spec = cls(in_features, out_features, rank, blocks)
    highest = max_rank(structure, in_features, out_features, blocks)
    if rank > highest:
        raise ValueError(
            f"{structure} of rank {rank} stores {spec.num_parameters} parameters where the dense "
            f"{out_features}x{in_features} matrix has {dense}: nothing is saved; use a rank of at most {highest}"
        )
    return spec


def max_rank(structure, in_features, out_features, num_blocks=None) -> int:
    """The largest rank that stores fewer numbers than the dense matrix; 0 if there is none."""
    cls = structure_class(structure)
    blocks = as_block_pair(cls.default_blocks if num_blocks is None else num_blocks)
    return cls.rank_within(in_features * out_features - 1, in_features, out_features, blocks)


def spec_from_dict(data: dict) -> BLRSpec:
    """The inverse of `BLRSpec.to_dict`. Raises ValueError for unknown or missing keys."""
    data = dict(data)
    cls = structure_class(data.pop("structure", None))
    wanted = {"in_features", "out_features", "rank", "num_blocks"}
    if set(data) != wanted:
        raise ValueError(f"a {cls.structure} spec has the keys {sorted(wanted)}, got {sorted(data)}")
    return cls(**data)


def as_block_pair(num_blocks) -> tuple[int, int]:
    """`b` means (b, b). Raises ValueError for anything but one or two positive integers."""
    pair = (num_blocks, num_blocks) if isinstance(num_blocks, int) else tuple(num_blocks)
    if len(pair) != 2 or not all(isinstance(b, int) and b >= 1 for b in pair):
        raise ValueError(f"num_blocks must be a positive integer or (input blocks, output blocks), got {num_blocks!r}")
    return pair


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
