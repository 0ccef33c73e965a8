"""The sizes of one block low-rank matrix: shapes, parameter counts, arithmetic, and the rank that a budget buys.

Letters, used everywhere in the package: `T` tokens, `K` in features, `N` out features, `B1` / `B2` input / output
blocks, `P = K / B1`, `Q = N / B2`, `R` rank. No torch in this file: it is arithmetic on sizes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from hf_blr.structures.pieces import Piece

#: what a stored tensor is. Factors are floating-point numbers that train; indices are integers, each of 0 to their
#: number less one once. A format that stores a factor in fewer bits keeps codes, the scales that multiply them, and the
#: factor's shape in their place
FACTOR, INDEX, CODES, SCALE, SHAPE = "factor", "index", "codes", "scale", "shape"


class StoredTensor(NamedTuple):
    """Shape and kind (`FACTOR`, `INDEX`, `CODES`, `SCALE` or `SHAPE`) of a tensor that a layer keeps under a name."""

    shape: tuple[int, ...]
    kind: str


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

    #: the structure's name
    structure: ClassVar[str]
    #: (B1, B2) when the user names none
    default_blocks: ClassVar[tuple[int, int]] = (1, 1)
    #: whether there can be more than one block on a side
    blocked: ClassVar[bool] = False
    #: {state-dict key: kind} in the order in which the ops take the tensors; factors come before indices
    kinds: ClassVar[dict[str, str]] = {"u": FACTOR, "v": FACTOR}
    #: factors that multiply number by number: few, and every error in one meets a whole row of another factor, so that
    #: formats of fewer bits leave them in the layer's dtype. All others multiply along their last axis
    elementwise: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_blocks", as_block_pair(self.num_blocks))
        for name in ("in_features", "out_features", "rank"):
            value = getattr(self, name)
            if not is_count(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not self.blocked and self.num_blocks != (1, 1):
            raise ValueError(f"{self.structure} has one block, got num_blocks={self.num_blocks}; leave num_blocks out")
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

    def tensors(self) -> dict[str, StoredTensor]:
        """{state-dict key: shape and kind}, in the order in which the ops take them."""
        return {name: StoredTensor(shape, self.kinds[name]) for name, shape in self.sizes().items()}

    def shapes(self, *kinds: str) -> dict[str, tuple[int, ...]]:
        """{state-dict key: shape} of the tensors of these kinds; of all without any."""
        return {name: t.shape for name, t in self.tensors().items() if not kinds or t.kind in kinds}

    @classmethod
    def names(cls, *kinds: str) -> tuple[str, ...]:
        """The state-dict keys of the tensors of these kinds; of all without any."""
        return tuple(name for name, kind in cls.kinds.items() if not kinds or kind in kinds)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """{state-dict key: shape}, in the order of `kinds`."""
        raise NotImplementedError

    def outputs(self, start: int, stop: int) -> Piece:
        """The rows of the matrix from start to stop. Raises ValueError where they are no layer of their own."""
        raise ValueError(f"{self.structure} layers cannot be split by outputs; keep them whole on each device")

    def inputs(self, start: int, stop: int) -> Piece:
        """The columns of the matrix from start to stop. Raises ValueError where they are no layer of their own."""
        raise ValueError(f"{self.structure} layers cannot be split by inputs; keep them whole on each device")

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward over `tokens` rows, a multiply-add as two."""
        return 2 * tokens * self.num_parameters

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

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form that `structures.spec_from_dict` reads back."""
        return {"structure": self.structure, **asdict(self), "num_blocks": list(self.num_blocks)}


def as_block_pair(num_blocks: Any) -> tuple[int, int]:
    """`b` means (b, b). Raises ValueError for anything but one or two positive integers."""
    pair = (num_blocks, num_blocks) if is_count(num_blocks) else num_blocks
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(is_count(b) and b >= 1 for b in pair):
        raise ValueError(f"num_blocks must be a positive integer or (input blocks, output blocks), got {num_blocks!r}")
    return pair[0], pair[1]


def block_pair_of(text: str) -> tuple[int, int]:
    """`4x16`, or `4` for `4x4`: block counts, or any two sizes. Raises ValueError for other text."""
    numbers = text.lower().split("x")
    if len(numbers) not in (1, 2) or not all(number.isdigit() and int(number) for number in numbers):
        raise ValueError(f"expected one or two positive integers such as 4 or 4x16, got {text!r}")
    return int(numbers[0]), int(numbers[-1])


def is_count(value: Any) -> bool:
    """Whether this is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
