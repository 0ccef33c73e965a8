"""What a compression asks of a journal, of one that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.joint import BlockReport
from hf_blr.calibration.progress import Progress
from hf_blr.compression.start import Start
from hf_blr.config import BLRConfig

#: the batches to fit to, and those held out
Text = tuple[list[Batch], list[Batch]]


class Unkept(Progress):
    """The journal of a compression whose caller named no folder: everything is done anew, and nothing is written."""

    def begin(
        self,
        model: nn.Module,
        config: BLRConfig,
        batches: list[Batch] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Notes what this compression is about, or compares it with what was noted when it began.

        Args:
            batches, statistics: those that the caller gave.

        Raises:
            ValueError: if the journal is about something else.
        """

    def text(self, draw: Callable[[], Text], device: torch.device) -> Text:
        """The batches as they were drawn when the compression began, on this device."""
        return draw()

    def start(self, find: Callable[[], Start]) -> Start:
        """What must be known before the first fit, as it was found when the compression began."""
        return find()

    def keep_layer(self, name: str, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
        """Keeps a finished layer.

        Args:
            name: of the layer.
            tensors: what it stores, or "weight" `[N, K]` of a dense one.
            said: what its report says.
        """

    def layer(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep_layer` kept, refined where its block has been since; None of a layer that is not finished."""
        return None

    def block_reports(self) -> list[BlockReport]:
        """Those of the blocks that were refined before this run, in the order in which they were."""
        return []

    def remove(self) -> None:
        """Takes away what was written."""
