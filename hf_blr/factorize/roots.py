"""What feedback takes of metrics, found once for each: a layer is tried in several formats."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_blr.factorize.row_blocks import moves_of, upper_root


class Roots:
    """Remembers a metric's roots for as long as the tensor lives; nobody may write to it meanwhile."""

    def __init__(self) -> None:
        self._uppers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._moves: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def upper(self, gram: Tensor) -> Tensor:
        """`[..., k, k]`, float64: row i says how columns behind i make up for an error in i."""
        if gram not in self._uppers:
            root = upper_root(gram)
            self._uppers[gram] = root / root.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        found: Tensor = self._uppers[gram]
        return found

    def moves(self, rows: Tensor, size: int) -> Tensor:
        """`moves_of` these rows in blocks of this size."""
        if rows not in self._moves:
            self._moves[rows] = moves_of(rows, size)
        found: Tensor = self._moves[rows]
        return found
