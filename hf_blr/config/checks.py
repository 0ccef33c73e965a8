"""What the fields of a config mean together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_blr.config.names import AUTO
from hf_blr.structures import structure_named

if TYPE_CHECKING:
    from hf_blr.config import BLRConfig


def check_budget(where: str, settings: dict[str, Any], planned: bool) -> None:
    """Raises ValueError unless `settings` names a structure and exactly one of ratio and rank; at most, if planned.

    A structure that stores the whole matrix takes neither.
    """
    whole = False
    try:
        if settings["structure"] != AUTO or where != "BLRConfig":
            whole = structure_named(settings["structure"]).whole
    except ValueError as error:
        chosen = f"; {AUTO!r} chooses one for each layer" if where == "BLRConfig" else ""
        raise ValueError(f"{where}: {error}{chosen}") from None
    given = [settings[key] for key in ("ratio", "rank") if settings[key] is not None]
    if whole:
        if given or settings["num_blocks"] is not None:
            raise ValueError(
                f"{where}: structure={settings['structure']!r} keeps the whole matrix: leave ratio, rank and "
                "num_blocks out"
            )
        return
    if len(given) != 1 and not (planned and not given):
        raise ValueError(
            f"{where}: give exactly one of ratio (kept / dense parameters) and rank, "
            f"got ratio={settings['ratio']!r} and rank={settings['rank']!r}"
        )


def check_without_text(config: BLRConfig, weighed: bool = False) -> None:
    """Raises ValueError for settings that are about text, of a fit that reads none.

    Args:
        weighed: whether statistics of the dense model say what its loss feels.
    """
    asked = {
        f"passes={config.passes} fit the model again to text": config.passes > 1,
        f"block_steps={config.block_steps} refine blocks on text": config.block_steps > 0,
    }
    if not (weighed or config.layers):
        asked['structure="auto" compares structures on text'] = config.structure == AUTO
        asked['allocation="loss" shares a ratio out by what the loss feels on text'] = config.allocation == "loss"
    for said, wanted in asked.items():
        if wanted:
            raise ValueError(f"{said}, and there is none: give text (dataset=, calibration=), or leave that out")


def check_unturned(config: BLRConfig) -> None:
    """Raises ValueError where statistics of a model are in question that is still to be turned."""
    if config.turned:
        raise ValueError(
            "turned=True turns the model before its statistics are collected: turn it with hf_blr.turn_stream(model), "
            "collect from it, and leave turned out"
        )


def check_together(config: BLRConfig, planned: bool) -> None:
    """Raises ValueError for settings that contradict each other."""
    if config.block_steps and not config.sequential:
        raise ValueError("block_steps refine what sequential fits leave: set sequential=True, or block_steps=0")
    if config.passes > 1 and not config.fisher:
        raise ValueError("another pass is weighed by the model that the one before left: set fisher=True, or passes=1")
    if planned:
        return
    if config.bits_per_weight is not None:
        return
    if config.structure == AUTO and (not config.shares_budget or config.num_blocks is not None):
        raise ValueError(
            'structure="auto" shares out a ratio by Fisher information and chooses the blocks: set ratio, leave '
            "num_blocks out, and allocation and fisher as they are"
        )
    if config.allocation == "loss" and (config.ratio is None or not config.fisher):
        raise ValueError('allocation="loss" shares out a ratio by Fisher information: set ratio, and fisher=True')
