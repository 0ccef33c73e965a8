"""A plan of more modules than a checkpoint can have, refused before transformers copies it many times."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_blr.checkpoint.headers import check_folder
from hf_blr.integration.on_import import wrap_once


def refuse_large_plans(configs: ModuleType) -> None:
    """Let every reading of a config in a folder begin with `check_folder`: by a class, an Auto class or a config."""

    def checking(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_config_dict(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            if path is not None and os.path.isdir(path):
                check_folder(Path(path) / (kwargs.get("subfolder") or ""))
            return original(cls, *args, **kwargs)

        return get_config_dict

    wrap_once(configs.PreTrainedConfig, "get_config_dict", checking)
