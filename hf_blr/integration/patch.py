"""The `blr_config=` keyword of `from_pretrained`."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_blr.checkpoint.files import naming_files
from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.integration.on_import import WRAPPED, when_imported
from hf_blr.integration.parallel import refuse_tensor_parallel
from hf_blr.integration.shapes import naming_shapes
from hf_blr.integration.source import dequantizing_config, is_compressed, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELING = "transformers.modeling_utils"

_enabled = False


def enable() -> None:
    """Let every `from_pretrained` of transformers take `blr_config=` (and `tokenizer=` beside it).

    `import hf_blr` does this. A second call changes nothing.
    """
    global _enabled
    _enabled = True
    when_imported(MODELING, wrap)


def disable() -> None:
    """Take the keyword back; `quantization_config=BLRConfig(...)` without a dataset works on.

    If another package has wrapped `from_pretrained` since, ours stays inside of it and hands calls through.
    """
    global _enabled
    _enabled = False
    if MODELING in sys.modules:
        pretrained = sys.modules[MODELING].PreTrainedModel
        current: Any = pretrained.__dict__["from_pretrained"].__func__
        # a wrapper made with functools.wraps carries our marks too, but they do not point to itself
        mark: Any = getattr(current, WRAPPED, None)
        if mark is current:
            pretrained.from_pretrained = current.hf_blr_original


def wrap(modeling: Any) -> None:
    """Replace `PreTrainedModel.from_pretrained`, where the Auto classes and all subclasses end up."""
    before = modeling.PreTrainedModel.__dict__["from_pretrained"]
    original = before.__func__
    if not _enabled or hasattr(original, WRAPPED):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, cls)
        if not _enabled:
            return call(*args, **kwargs)
        write_out_stored(kwargs)
        config = take_config(kwargs)
        path: Any = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with ExitStack() as named:
            if path is not None and os.path.isdir(path):
                named.enter_context(naming_files(Path(path)))
                named.enter_context(naming_shapes(cls, Path(path)))
            return call(*args, **kwargs) if config is None else load(call, config, args, kwargs)

    wrapper: Any = from_pretrained
    # not `wrap_once`: `disable` must know ours from others' wrappers
    setattr(wrapper, WRAPPED, wrapper)
    wrapper.hf_blr_original = before
    modeling.PreTrainedModel.from_pretrained = classmethod(wrapper)


def write_out_stored(kwargs: dict[str, Any]) -> None:
    """Let `config=model.config` pass: transformers expects the dict that a config.json gives."""
    stored = getattr(kwargs.get("config"), "quantization_config", None)
    if isinstance(stored, BLRConfig):
        kwargs["config"] = copy.copy(kwargs["config"])
        kwargs["config"].quantization_config = stored.to_dict()


def take_config(kwargs: dict[str, Any]) -> BLRConfig | None:
    """Take the BLR config out of `from_pretrained`'s keywords, as a copy; None without one.

    Raises:
        ValueError: if both `blr_config` and `quantization_config` are given, or the config is out of range.
        TypeError: if `blr_config` is no config.
    """
    given, other = kwargs.pop("blr_config", None), kwargs.get("quantization_config")
    if given is not None and other is not None:
        raise ValueError(
            "from_pretrained got blr_config and quantization_config, two names for one thing: give only blr_config"
        )
    if given is None:
        if not is_blr(other):
            return None
        given = kwargs.pop("quantization_config")
    elif not isinstance(given, (BLRConfig, dict)):
        raise TypeError(f"blr_config must be a BLRConfig or a dict of its arguments, got {type(given).__name__}")
    return BLRConfig(**given) if isinstance(given, dict) else copy.deepcopy(given)


def is_blr(config: Any) -> bool:
    """Whether a `quantization_config`, object or dict, is one of ours."""
    return isinstance(config, BLRConfig) or (isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD)


def load(original: Callable[..., Any], config: BLRConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `from_pretrained` does with a BLR config.

    Fits to the weights alone stream while transformers loads. Fits to activations, models that are turned, and GGUF
    files (which transformers does not combine with a quantizer), take a loaded dense model.

    Raises:
        ValueError: if activations are asked for and there is no tokenizer.
        NotImplementedError: with tensor parallelism.
    """
    sharding = {name: kwargs.get(name) for name in ("distributed_config", "tp_plan", "tp_size")}
    refuse_tensor_parallel(**sharding)
    tokenizer = kwargs.pop("tokenizer", None)
    path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    from_gguf = kwargs.get("gguf_file") is not None
    streams = not (config.calibrated or config.turned or from_gguf)
    if streams or (not from_gguf and is_compressed(path, kwargs)):
        return original(*args, **{**kwargs, "quantization_config": config})

    from hf_blr.compression import compress

    if config.calibrated and tokenizer is None:
        tokenizer = load_tokenizer(path, kwargs)
    if from_gguf:
        kwargs["quantization_config"] = dequantizing_config()
    loaded = original(*args, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    compress(model, config, tokenizer=tokenizer)
    return loaded
