"""The journal of one compression: a folder that holds what is finished."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

from hf_blr.atomic import check_writable, left_by_killed
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.joint import BlockReport
from hf_blr.calibration.store import Kept, StoredTensors, distinct
from hf_blr.compression.allocation import Choice
from hf_blr.compression.journal.files import (
    naming,
    read_json,
    read_tensors,
    write_json,
    write_tensor,
    write_tensors,
)
from hf_blr.compression.journal.fingerprints import difference, of_batches, of_config, of_model, of_statistics
from hf_blr.compression.journal.unkept import Text, Unkept
from hf_blr.compression.start import Start
from hf_blr.config import BLRConfig
from hf_blr.linear import blr_modules
from hf_blr.plan import layers_from_plan, plan_from_layers

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

#: with another version, files may mean something else and numbers come out otherwise
SOFTWARE = {"journal": 1, "torch": torch.__version__}
ENDING = ".safetensors"
#: what the journal is about; the batches; where the fits begin
ABOUT, TEXT, START = "journal.json", "text.safetensors", "start.json"
#: what the first and the last of them say
SAID = ("software", "model", "config", "batches", "statistics")
BEGINNING = ("plan", "predicted_loss", "choices", "statistics")
#: folders: of finished layers and blocks, and of matrices that fits need
FOLDERS = ("layers", "blocks", "statistics")
#: the fields of `Statistics` that hold them
MATRICES = ("grams", "output_grams")


class Journal(Unkept):
    """What a compression has finished, in a folder, so that a run that was stopped is gone on with.

    It holds the text that was drawn, what must be known before the first fit, and each finished layer in the form in
    which it is stored: about as much as the compressed model, and the matrices G of the layers. Each file is written
    whole or not at all. Also a context manager, which removes the folder at the end of a `with` without an error: save
    the model inside of it.

    Args:
        folder: of this compression alone; made when there is something to keep.

    Raises:
        ValueError: if the folder cannot be written, or holds something else.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        about = self.folder / ABOUT
        try:
            check_writable(self.folder)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot keep a journal ({error}); name a place that can") from None
        scratch = [path for place in ("", *FOLDERS) for path in left_by_killed(self.folder / place)]
        if not about.exists() and any(path not in scratch for path in self.folder.glob("*")):
            raise ValueError(f"{self.folder} holds something else than a journal; name a folder for it alone")
        self.about: dict[str, Any] = read_json(about, SAID) if about.exists() else {}
        for path in scratch:
            path.unlink()
        self.layers = names_in(self.folder / "layers")
        self.blocks = names_in(self.folder / "blocks")
        self._latest: tuple[str, dict[str, Tensor]] | None = None
        if self.layers:
            logger.info("%s holds %d finished layers: they are not fitted again", self.folder, len(self.layers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.remove()

    def remove(self) -> None:
        """Takes away what the journal has written, and the folder if there is nothing else in it."""
        # last what makes a journal of it
        for kind in FOLDERS:
            shutil.rmtree(self.folder / kind, ignore_errors=True)
        for name in (TEXT, START, ABOUT):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def begin(
        self,
        model: nn.Module,
        config: BLRConfig,
        batches: list[Batch] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        about = {
            "software": SOFTWARE,
            "model": of_model(model),
            "config": of_config(config),
            "batches": None if batches is None else of_batches(batches),
            "statistics": None if statistics is None else of_statistics(statistics),
        }
        for what, found in about.items():
            if self.about and self.about.get(what) != found:
                where = difference(self.about.get(what), found)
                raise ValueError(
                    f"{self.folder} is the journal of a compression with another {what}{where and f' ({where})'}; give "
                    "the same, or name another folder"
                )
        if not self.about:
            self.about = about
            write_json(self.folder / ABOUT, about)

    def text(self, draw: Callable[[], Text], device: torch.device) -> Text:
        path = self.folder / TEXT
        if not path.exists():
            drawn = draw()
            tensors = {
                f"{part} {i} {key}": value
                for part, batches in enumerate(drawn)
                for i, batch in enumerate(batches)
                for key, value in batch.items()
            }
            if tensors:
                write_tensors(path, tensors, {})
            return drawn
        parts: tuple[dict[int, Batch], dict[int, Batch]] = ({}, {})
        for name, value in read_tensors(path)[0].items():
            part, i, key = name.split(" ", 2)
            parts[int(part)].setdefault(int(i), {})[key] = value.to(device)
        fitted, apart = ([batches[i] for i in sorted(batches)] for batches in parts)
        return fitted, apart

    def start(self, find: Callable[[], Start]) -> Start:
        path = self.folder / START
        if not path.exists():
            found = find()
            value = {
                "plan": layers_from_plan(found.plan),
                "predicted_loss": found.predicted_loss,
                "choices": {name: asdict(choice) for name, choice in found.choices.items()},
                "statistics": found.statistics and self.kept_statistics(found.statistics),
            }
            write_json(path, value)
        # read in any case: what lies in files needs no memory
        kept = read_json(path, BEGINNING)

        def read() -> Start:
            choices = {name: Choice(**choice) for name, choice in kept["choices"].items()}
            statistics = kept["statistics"] and self.read_statistics(kept["statistics"])
            return Start(plan_from_layers(kept["plan"]), kept["predicted_loss"], choices, statistics)

        return naming(path, read)

    def kept_statistics(self, statistics: Statistics) -> dict[str, Any]:
        """Writes the matrices into files of their own; returns the rest, with {name: file} in their place."""
        # what is found out from them is found out again
        said = {**vars(statistics), "unreached": sorted(statistics.unreached), "known": {}}
        for kind in MATRICES:
            files: dict[str, str] = {}
            for i, (names, tensor) in enumerate(distinct(getattr(statistics, kind))):
                write_tensor(self.folder / "statistics" / f"{kind}-{i}.pt", tensor)
                files |= dict.fromkeys(names, f"{kind}-{i}.pt")
            said[kind] = files
        return said

    def read_statistics(self, said: dict[str, Any]) -> Statistics:
        """What `kept_statistics` wrote; its matrices stay in the files."""
        folder, matrices = self.folder / "statistics", {}
        for kind in MATRICES:
            once = {file: Kept(folder / file, torch.device("cpu")) for file in set(said[kind].values())}
            matrices[kind] = StoredTensors({name: once[file] for name, file in said[kind].items()})
        return Statistics(**{**said, **matrices, "unreached": frozenset(said["unreached"])})

    def keep_layer(self, name: str, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
        write_tensors(self.file("layers", name), tensors, said)

    def layer(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if name not in self.layers:
            return None
        tensors, said = read_tensors(self.file("layers", name))
        for block in self.blocks:
            if f"{name}.".startswith(f"{block}."):
                refined = self.refined(block)
                tensors = {key: refined.get(f"{name}.{key}", value) for key, value in tensors.items()}
        return tensors, said

    def refined(self, block: str) -> dict[str, Tensor]:
        """What a complete block's layers store, which come one after the other: the latest block stays in memory."""
        if self._latest is None or self._latest[0] != block:
            self._latest = block, read_tensors(self.file("blocks", block))[0]
        return self._latest[1]

    def block_done(self, name: str, block: nn.Module, report: BlockReport | None) -> None:
        tensors: dict[str, Tensor] = {}
        if report is not None:
            for path, module in blr_modules(block).items():
                layer = f"{name}.{path}" if path else name
                tensors |= {f"{layer}.{key}": value for key, value in module.stored().items()}
        number = len(names_in(self.folder / "blocks"))
        write_tensors(self.file("blocks", name), tensors, {"number": number, "report": report and asdict(report)})

    def block_reports(self) -> list[BlockReport]:
        said = [read_tensors(self.file("blocks", block))[1] for block in self.blocks]
        said.sort(key=lambda each: each["number"])
        return [BlockReport(**each["report"]) for each in said if each["report"]]

    def file(self, kind: str, name: str) -> Path:
        return self.folder / kind / (quote(name, safe="") + ENDING)


def names_in(folder: Path) -> frozenset[str]:
    """Of what is kept in files of their own."""
    return frozenset(unquote(path.name.removesuffix(ENDING)) for path in folder.glob(f"*{ENDING}"))
