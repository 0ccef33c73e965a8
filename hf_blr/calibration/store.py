"""Where a calibration keeps its tensors: in memory as far as a limit allows, and elsewhere beyond that.

What a GPU has no room for goes to the memory of its host, as long as half of that stays free, and then to files.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableSequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, overload

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor

from hf_blr.calibration.host import host_has_room

if TYPE_CHECKING:
    from typing_extensions import Self


class Store:
    """Keeps statistics and hidden states; a context manager that removes its files at the end.

    Args:
        limit: bytes, or "6GB", that kept tensors take in the memory of the device where they are made at most, those
            that are just worked on not counted; None: no limit, and no files.
        folder: where a folder for the files is made; None: where the system keeps temporary ones.

    Raises:
        ValueError: if the limit is neither.
    """

    def __init__(self, limit: int | str | None = None, folder: str | Path | None = None):
        self.limit = limit if limit is None else size_of(limit)
        self.used = 0
        self._folder, self._files = folder, 0
        self._made: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._made is not None:
            self._made.cleanup()

    def keep(self, tensor: Tensor, away: bool = False) -> Kept:
        """Keeps a tensor, elsewhere if it is asked for or there is no room left. Raises OSError for a full disk."""
        size = tensor.numel() * tensor.element_size()
        if not away and (self.limit is None or self.used + size <= self.limit):
            self.used += size
            kept = Kept(tensor, tensor.device)
            weakref.finalize(kept, self._release, size).atexit = False
            return kept
        if tensor.device.type != "cpu" and host_has_room(size):
            return Kept(tensor.detach().cpu(), tensor.device)
        if self._made is None:
            if self._folder is not None:
                Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._made = tempfile.TemporaryDirectory(prefix="hf-blr-", dir=self._folder, ignore_cleanup_errors=True)
        path = Path(self._made.name) / f"{self._files}.pt"
        self._files += 1
        try:
            torch.save(tensor.detach().cpu(), path)
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written ({error}); is the disk full?") from error
        kept = Kept(path, tensor.device)
        weakref.finalize(kept, path.unlink, missing_ok=True).atexit = False
        return kept

    def keep_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Kept]:
        """Keeps tensors elsewhere, those that names share once."""
        kept: dict[str, Kept] = {}
        for names, tensor in distinct(tensors):
            away = self.keep(tensor, away=True)
            away.is_zero = not tensor.any()
            kept |= dict.fromkeys(names, away)
        return {name: kept[name] for name in tensors}

    def list(self, tensors: Iterable[Tensor] = ()) -> StoredList:
        """A list of tensors kept here."""
        return StoredList(self, tensors)

    def _release(self, size: int) -> None:
        self.used -= size


def size_of(limit: int | str) -> int:
    """In bytes. Raises ValueError for anything but a number of bytes or a size."""
    size: object = limit
    if isinstance(limit, str):
        with suppress(ValueError):
            size = convert_file_size_to_int(limit)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f'max_memory must be a number of bytes or a size such as "6GB", got {limit!r}')
    return size


class Kept:
    """One tensor in a store, for as long as somebody holds on to this."""

    def __init__(self, place: Tensor | Path, device: torch.device):
        self._place, self._device = place, device

    def tensor(self) -> Tensor:
        """The tensor, on the device where it was; each time another one where it lies elsewhere."""
        if isinstance(self._place, Path):
            return torch.load(self._place, map_location=self._device, weights_only=True)
        return self._place.to(self._device)

    @cached_property
    def is_zero(self) -> bool:
        """Whether it holds zeros alone; it is read for that where nobody has said so."""
        return not self.tensor().any()


class StoredList(MutableSequence[Tensor]):
    """A list whose tensors lie in a store. What is read from it must not be written to."""

    def __init__(self, store: Store, tensors: Iterable[Tensor] = ()):
        self._store, self._kept = store, [store.keep(tensor) for tensor in tensors]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [kept.tensor() for kept in self._kept[index]]
        return self._kept[index].tensor()

    def __setitem__(self, index: int, tensor: Tensor) -> None:  # type: ignore[override]
        # first the old one goes, whose room the new one may take
        del self._kept[index]
        self._kept.insert(index, self._store.keep(tensor))

    def __delitem__(self, index: int | slice) -> None:
        del self._kept[index]

    def __len__(self) -> int:
        return len(self._kept)

    def insert(self, index: int, tensor: Tensor) -> None:
        self._kept.insert(index, self._store.keep(tensor))


class StoredTensors(Mapping[str, Tensor]):
    """{name: tensor} of what is kept; names of one tensor share it."""

    def __init__(self, kept: Mapping[str, Kept]):
        self.kept = kept

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name].tensor()

    def __contains__(self, name: object) -> bool:
        # a mapping's own would read the tensor
        return name in self.kept

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def distinct(tensors: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """(names, the tensor that they share) of each tensor."""
    held: Mapping[str, Tensor | Kept] = tensors.kept if isinstance(tensors, StoredTensors) else tensors
    names: dict[int, list[str]] = {}
    for name, each in held.items():
        names.setdefault(id(each), []).append(name)
    for sharing in names.values():
        yield sharing, tensors[sharing[0]]


def is_zero(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor holds zeros alone."""
    return tensors.kept[name].is_zero if isinstance(tensors, StoredTensors) else not tensors[name].any()


def only(tensors: Mapping[str, Tensor], names: Collection[str]) -> Mapping[str, Tensor]:
    """Those of these names, where they lie."""
    if isinstance(tensors, StoredTensors):
        return StoredTensors({name: kept for name, kept in tensors.kept.items() if name in names})
    return {name: tensor for name, tensor in tensors.items() if name in names}
