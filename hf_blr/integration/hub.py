"""What `save_pretrained` and `push_to_hub` write for others beside the model: its card."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_blr.checkpoint.card import write_card
from hf_blr.config import BLRConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_cards(modeling: Any) -> None:
    """Let transformers' models write the cards of compressed ones. A second call changes nothing."""
    pretrained = modeling.PreTrainedModel
    save, upload = pretrained.save_pretrained, pretrained._upload_modified_files
    if hasattr(save, "hf_blr_wrapper"):
        return

    @functools.wraps(save)
    def save_pretrained(
        self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        result = save(self, save_directory, is_main_process, *args, **kwargs)
        # with an adapter on the model, only that is saved
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            add_card(self, Path(save_directory))
        return result

    @functools.wraps(upload)
    def upload_modified_files(self: PreTrainedModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # by now transformers has put the hub's own card into the folder, or a template of its
        add_card(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    marked: Any = save_pretrained
    marked.hf_blr_wrapper = True
    pretrained.save_pretrained, pretrained._upload_modified_files = save_pretrained, upload_modified_files


def add_card(model: PreTrainedModel, folder: Path, name: str | None = None) -> None:
    """Write the card of a compressed model, where the folder holds it."""
    stored = getattr(model.config, "quantization_config", None)
    if isinstance(stored, BLRConfig) and stored.layers and (folder / "config.json").exists():
        write_card(folder, model.config, name)
