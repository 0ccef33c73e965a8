"""What lies beside a model's weights: its config, its tokenizer, and how a GGUF file is read."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: from_pretrained's keywords that say where a repository's files are
PLACE_KEYWORDS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def is_compressed(path: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> bool:
    """Whether the checkpoint has a `quantization_config`, ours or another; transformers deals with both."""
    from transformers import PreTrainedConfig

    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return getattr(config, "quantization_config", None) is not None
    source = config if config is not None else path
    if source is None:
        return False
    place = {name: kwargs[name] for name in PLACE_KEYWORDS if name in kwargs}
    return PreTrainedConfig.get_config_dict(source, **place)[0].get("quantization_config") is not None


def load_tokenizer(path: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model's weights. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    advice = "pass from_pretrained(..., tokenizer=tokenizer), or a BLRConfig without a dataset"
    if path is None:
        raise ValueError(f"a fit to BLRConfig.dataset needs a tokenizer, and no path says where it is: {advice}")
    names = (*PLACE_KEYWORDS, "trust_remote_code", "gguf_file")
    try:
        return AutoTokenizer.from_pretrained(path, **{name: kwargs[name] for name in names if name in kwargs})
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: holds no tokenizer for the fit to BLRConfig.dataset: {advice}") from error


def dequantizing_config() -> Any:
    """Asks transformers for a plain dense model out of a GGUF file; None where it always gives one."""
    import transformers

    # the class came with the release in which a GGUF load began to leave a quantizer on the model
    gguf_config = getattr(transformers, "GgufConfig", None)
    return None if gguf_config is None else gguf_config(dequantize=True)


@contextmanager
def reading_once() -> Iterator[None]:
    """A GGUF file is parsed once inside; config, weights and tokenizer each do it by themselves, for seconds.

    The table of its tensors' names is made once too, where transformers makes it for each module of the model.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:
        # transformers says so where the file is read
        yield
        return
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    made = {**kept, "GGUFReader": with_plain_data(kept["GGUFReader"])}
    for name, make in made.items():
        setattr(gguf, name, functools.cache(make))
    try:
        yield
    finally:
        for name, make in kept.items():
            setattr(gguf, name, make)


def with_plain_data(reader: type) -> type:
    """The reader with the file as a plain array: of a memmap, which it takes, a million slices are slow."""

    class Reader(reader):
        @property
        def data(self) -> Any:
            return self.__dict__["data"]

        @data.setter
        def data(self, mapped: Any) -> None:
            self.__dict__["data"] = mapped.view(np.ndarray)

    return Reader
