"""What `save_pretrained` and `push_to_hub` write for others beside the model: its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_blr.checkpoint.card import write_card
from hf_blr.config import BLRConfig
from hf_blr.integration.on_import import wrap_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_cards(modeling: Any) -> None:
    """Let transformers' models write the cards of compressed ones. A second call changes nothing."""

    def with_card(save: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(
            self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
        ) -> Any:
            result = save(self, save_directory, is_main_process, *args, **kwargs)
            # with an adapter on the model, only that is saved
            if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
                add_card(self, Path(save_directory))
            return result

        return save_pretrained

    def with_named_card(upload: Callable[..., Any]) -> Callable[..., Any]:
        def upload_modified_files(
            self: PreTrainedModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any
        ) -> Any:
            # by now transformers has put the hub's own card into the folder, or a template of its
            add_card(self, Path(working_dir), repo_id)
            return upload(self, working_dir, repo_id, *args, **kwargs)

        return upload_modified_files

    wrap_once(modeling.PreTrainedModel, "save_pretrained", with_card)
    wrap_once(modeling.PreTrainedModel, "_upload_modified_files", with_named_card)


def add_card(model: PreTrainedModel, folder: Path, name: str | None = None) -> None:
    """Write the card of a compressed model, where the folder holds it."""
    stored = getattr(model.config, "quantization_config", None)
    if isinstance(stored, BLRConfig) and stored.layers and (folder / "config.json").exists():
        write_card(folder, model.config, name)
