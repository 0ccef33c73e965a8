"""What a compressed checkpoint's config and index say, looked at before transformers acts on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_blr.checkpoint.folder import check_folder, check_notice
from hf_blr.integration.on_import import wrap_once


def check_config_files(configs: ModuleType) -> None:
    """Let each reading of a config, by a class, an Auto class or a config, begin with `check_folder` in a local folder.

    It ends with `check_notice`.
    """

    def checking(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_config_dict(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            if path is not None and os.path.isdir(path):
                check_folder(Path(path) / (kwargs.get("subfolder") or ""))
            found = original(cls, *args, **kwargs)
            check_notice(found[0], path)
            return found

        return get_config_dict

    wrap_once(configs.PreTrainedConfig, "get_config_dict", checking)
