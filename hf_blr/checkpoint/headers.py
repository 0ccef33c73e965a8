"""A look into a checkpoint's headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_blr.checkpoint.layout import ModuleNames
from hf_blr.checkpoint.verify import describe
from hf_blr.plan import Plan
from hf_blr.structures import structures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_files(model: PreTrainedModel, plan: Plan, files: list[str] | None) -> None:
    """Compare what a BLR checkpoint's safetensors files hold with the plan, before any tensor is read.

    Args:
        model: still with its dense modules.
        plan: under the model's own module names.
        files: the checkpoint's; None, and other formats, are left to the check after the load.

    Raises:
        ValueError: naming the tensors that a planned module has no place for, or that have another shape.
    """
    names = ModuleNames(model)
    extra: list[str] = []
    misshapen: list[str] = []
    of_layers = {tensor for record in structures().values() for tensor in record.spec.names()}
    for key, shape in stored_shapes(files or []):
        owner, _, leaf = key.rpartition(".")
        name = names.find(owner)
        if name is None:
            # of a head that this class does not have
            continue
        if name not in plan:
            if leaf in of_layers and not hasattr(names.modules[name], leaf):
                extra.append(f"{key} (the config's layers do not list this module)")
            continue
        wanted = plan[name].stored_shapes()
        if leaf not in wanted:
            extra.append(f"{key} (a {plan[name].spec.structure} module has {', '.join(wanted)})")
        elif shape != wanted[leaf]:
            misshapen.append(f"{key} (shape {shape}, the config's layers say {wanted[leaf]})")
    if extra or misshapen:
        raise ValueError(
            f"{(extra + misshapen)[0].partition(' ')[0]}: the checkpoint does not fit its own config. "
            + describe("Tensors without a place", extra)
            + describe("Tensors of another shape", misshapen)
            + "Load a dense checkpoint with blr_config= instead of a config that says it is compressed, and "
            "a compressed one with the config.json that was saved with it"
        )


def stored_shapes(files: list[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in those of the files that are safetensors."""
    from safetensors import safe_open

    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no mapping
                    yield key, tuple(tensors.get_slice(key).get_shape())
