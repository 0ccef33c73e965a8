"""The fields of a `BLRConfig` that say in what form layers are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_blr.config.names import AUTO
from hf_blr.config.options import boolean, integer, option
from hf_blr.config.settings import BECOMES, FITTED, BLRSettings
from hf_blr.formats import FORMATS, PLAIN, Format, format_named, takes_groups
from hf_blr.structures import structure_named, whole_structures
from hf_blr.structures.spec import is_count

if TYPE_CHECKING:
    from hf_blr.config import BLRConfig

#: the group of `--help`
STORED = "how the layers are stored"

FORMAT_KEYS = ("factor_format", "dense_format", "group_size")


def format_name(value: Any) -> str | None:
    known = isinstance(value, str) and value in FORMATS
    return None if known else f"one of {tuple(FORMATS)} (a later hf_blr may know more)"


def group_size(value: Any) -> str | None:
    right = value is None or (is_count(value) and (value == -1 or value >= 1))
    return None if right else "a positive integer, or None (or -1) for one scale a row"


def positive(value: Any) -> str | None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    return None if right or value is None else "a positive number of bits, or None"


FORMAT_CHECKS = {"factor_format": format_name, "dense_format": format_name, "group_size": group_size}


@dataclass(eq=False, repr=False)
class StorageSettings(BLRSettings):
    """What a user says of bits, behind all other fields in the order of the constructor."""

    factor_format: str = option(
        PLAIN.name,
        'How factors are stored: "plain" in the dtype of the model, "int8", "int4", "int3", "int2" or "fp8". Factors '
        "that multiply number by number (BLAST's s), indices and biases stay as they are.",
        format_name,
        flag="--factor-format",
        group=STORED,
        choices=tuple(FORMATS),
    )
    dense_format: str = option(
        PLAIN.name,
        'How the target layers that keep their whole matrix are stored: those with structure="dense", and those that '
        "the budget leaves dense.",
        format_name,
        flag="--dense-format",
        group=STORED,
        cli_help="how layers that keep their whole matrix are stored: those of --structure dense, and those that the "
        "budget leaves dense",
        choices=tuple(FORMATS),
    )
    group_size: int | None = option(
        None,
        "Numbers along a row of a factor that share a scale, in formats of integers; if left out, or -1, all of a row.",
        group_size,
        flag="--group-size",
        group=STORED,
        type=int,
    )

    bits_per_weight: float | None = option(
        None,
        'With structure="auto", in place of a ratio: bits that all target layers may store for each number of their '
        "dense matrices, scales, indices and all else included. Each layer gets the structure, rank and format of the "
        "least predicted loss. Needs text and `fisher`.",
        positive,
        flag="--bits-per-weight",
        cli_help="with --structure auto, in place of a ratio: bits that all replaced layers may store for each number "
        "of their dense matrices, all included; each layer gets the structure, rank and format of the least predicted "
        "loss",
        group=STORED,
        type=float,
        size=True,
    )
    turned: bool = option(
        False,
        "Turn the residual stream into a random orthogonal basis of `seed` first, in which no weights stand out: where "
        "some do, bits then lose less. A head that shares its matrix with the embedding gets one of its own. For "
        "models of text whose stream is read through RMS norms alone.",
        boolean,
        flag="--turned",
        group=FITTED,
        cli_help="turn the residual stream into a random orthogonal basis first, in which no weights stand out: where "
        "some do, bits then lose less; a head that shares its matrix with the embedding gets one of its own",
    )
    rank_multiple: int | None = option(
        None,
        "Ranks that a ratio or a budget buys are cut so that this divides the rows that are as long as they are, where "
        "no more than a sixteenth is given for it. 128 is best for kernels; if left out, ranks of a shared budget are "
        "multiples of 16.",
        integer(1, optional=True),
        flag="--rank-multiple",
        group=BECOMES,
        cli_help="cut ranks so that this divides the rows that are as long as they are, where no more than a sixteenth "
        "is given for it; 128 is best for kernels",
        type=int,
    )

    def storage_of(self, structure: str, override: dict[str, Any]) -> Format:
        """The format of a layer of this structure, with the override's values in place of the config's own."""
        settings = {key: getattr(self, key) for key in FORMAT_KEYS} | override
        name = settings["dense_format" if structure_named(structure).whole else "factor_format"]
        grouped = takes_groups(name) and settings["group_size"] not in (None, -1)
        return format_named(name, settings["group_size"] if grouped else None)


def check_storage(config: BLRConfig) -> None:
    """Raises ValueError for settings of bits that contradict others."""
    everywhere = [{}, *(config.overrides or {}).values()]
    used = {values.get(key, getattr(config, key)) for values in everywhere for key in ("factor_format", "dense_format")}
    if config.structure in whole_structures() and config.dense_format == PLAIN.name and not config.layers:
        raise ValueError(f"structure={config.structure!r} stores whole matrices in fewer bits: set dense_format")
    if config.bits_per_weight is not None:
        check_bits(config)
    elif config.group_size is not None and not any(takes_groups(name) for name in used):
        raise ValueError(
            f"group_size={config.group_size} is of formats of integers, and no layer has one: set factor_format or "
            "dense_format"
        )


def check_bits(config: BLRConfig) -> None:
    """Raises ValueError for settings that contradict a budget of bits."""
    where = f"bits_per_weight={config.bits_per_weight:g}"
    if config.structure != AUTO:
        raise ValueError(
            f'{where} chooses structure, rank and format of each layer: set structure="auto", got {config.structure!r}'
        )
    if config.ratio is not None or config.rank is not None or config.num_blocks is not None:
        raise ValueError(
            f"{where} is a budget of its own, got ratio={config.ratio}, rank={config.rank} and "
            f"num_blocks={config.num_blocks}; leave them out"
        )
    if {config.factor_format, config.dense_format} != {PLAIN.name}:
        raise ValueError(
            f"{where} chooses formats, got factor_format={config.factor_format!r} and "
            f"dense_format={config.dense_format!r}; leave them out, or set them in overrides"
        )
    if config.layers:
        return
    if not config.fisher or config.allocation == "uniform":
        raise ValueError(f"{where} is shared out by Fisher information: leave fisher and allocation as they are")
