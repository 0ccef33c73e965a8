"""A checkpoint whose shards are written while a model is being compressed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader, convert_file_size_to_int
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_blr.calibration.blocks import numbered
from hf_blr.checkpoint.files import tensors_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: as transformers names the files of a checkpoint
WHOLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-{:05d}-of-{:05d}.safetensors"


class Shards:
    """Takes finished layers out of memory, into files of the checkpoint that they end in.

    A layer whose block is complete changes no more. As soon as such layers take `size` bytes they are written to a
    shard, and accelerate reads them from there if they run again. So no more finished layers are in memory than a shard
    and a block have. The model works for as long as the folder is there; it is to be saved by `save`, and read from
    there afterwards.

    Args:
        folder: of the checkpoint, which exists; put in its place once the checkpoint is whole.
        size: of a shard, bytes or "5GB". A model whose layers take less gets its files from `save_pretrained` alone.
    """

    def __init__(self, folder: str | Path, size: int | str = "5GB"):
        self.folder = Path(folder)
        self.size = convert_file_size_to_int(size)
        #: {tensor: its shard} of what is written
        self.places: dict[str, str] = {}
        self._block = ""
        self._unfinished: list[str] = []
        self._finished: dict[str, int] = {}

    def add(self, model: nn.Module, name: str) -> None:
        """A layer has been replaced. Raises OSError if a shard cannot be written."""
        block = next(iter(numbered(name)), name)
        if block != self._block:
            for each in self._unfinished:
                self._finished[each] = sum(t.numel() * t.element_size() for t in tensors_of(model, each).values())
            self._block, self._unfinished = block, []
            if sum(self._finished.values()) >= self.size:
                self.write(model)
        self._unfinished.append(name)

    def write(self, model: nn.Module) -> None:
        """The layers of complete blocks into the next shard."""
        file = f"finished-{len(set(self.places.values())) + 1:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in self._finished:
            tensors |= tensors_of(model, name)
        save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, self.folder / file, {"format": "pt"})
        self.places |= dict.fromkeys(tensors, file)
        found = {key: {"safetensors_file": str(self.folder / file), "weight_name": key} for key in tensors}
        files = OffloadedWeightsLoader(index=found, save_folder=self.folder)
        for name in self._finished:
            module = model.get_submodule(name)
            device = next(module.parameters()).device
            attach_align_device_hook(module, device, offload=True, weights_map=files, module_name=name)
        self._finished = {}

    def save(self, model: PreTrainedModel) -> None:
        """What is not written yet, the config and the index.

        Raises:
            OSError: if the folder cannot be written.
        """
        rest = {key: tensor for key, tensor in model.state_dict().items() if key not in self.places}
        model.save_pretrained(self.folder, state_dict=rest)
        if not self.places:
            return
        index = self.folder / INDEX
        if index.exists():
            places = json.loads(index.read_text())["weight_map"]
        else:
            places = {key: WHOLE for key, _, _ in tensors_in(str(self.folder / WHOLE))}
        places |= self.places
        files = sorted(set(places.values()))
        size = sum((self.folder / file).stat().st_size for file in files)
        names = {file: SHARD.format(i + 1, len(files)) for i, file in enumerate(files)}
        for file, name in names.items():
            os.rename(self.folder / file, self.folder / name)
        about = {"metadata": {"total_size": size}, "weight_map": {key: names[file] for key, file in places.items()}}
        index.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{name in the checkpoint: tensor} of one layer."""
    return {f"{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
