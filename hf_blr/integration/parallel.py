"""Tensor parallelism is not supported yet: it would shard factors as if they were dense weights."""

from __future__ import annotations

from typing import Any

from torch import nn

MESSAGE = (
    "BLR modules cannot be split over devices by tensor or expert parallelism yet, got {what}; load without "
    "it, and use device_map, FSDP or data parallelism"
)


def refuse_tensor_parallel(distributed_config: Any = None, **keywords: Any) -> None:
    """Raises NotImplementedError if from_pretrained's distributed_config, tp_plan or tp_size ask for it."""
    for name, value in keywords.items():
        if value is not None:
            raise NotImplementedError(MESSAGE.format(what=f"{name}={value!r}"))
    if distributed_config is None:
        return
    # transformers 5.0 has no tp_plan in it: there, any distributed config means the model's own plan
    plan = getattr(distributed_config, "tp_plan", "auto")
    sizes = [getattr(distributed_config, name, None) or 1 for name in ("tp_size", "ep_size")]
    if plan or max(sizes) > 1 or getattr(distributed_config, "enable_expert_parallel", False):
        raise NotImplementedError(MESSAGE.format(what=f"distributed_config={distributed_config}"))


def refuse_sharded(model: nn.Module) -> None:
    """Raises NotImplementedError if the loader has split the model's tensors over devices."""
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise NotImplementedError(MESSAGE.format(what=f"tp_size={size}"))
