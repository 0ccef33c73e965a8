"""`BLRConfig`: what to compress, into what, and fitted how."""

from __future__ import annotations

import copy
import difflib
import functools
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_blr.config import options
from hf_blr.config.checks import check_budget, check_together
from hf_blr.config.names import AUTO, FORMAT_VERSION, QUANT_METHOD, SIZE_KEYS
from hf_blr.config.options import check_fields, integer
from hf_blr.config.storage import FORMAT_CHECKS, FORMAT_KEYS, StorageSettings, check_storage
from hf_blr.config.texts import check_dataset, stored_dataset
from hf_blr.factorize.options import FitOptions, damping_of
from hf_blr.structures import as_block_pair, structure_named

__all__ = ["AUTO", "FORMAT_VERSION", "QUANT_METHOD", "BLRConfig", "option_fields"]


@dataclass(eq=False, repr=False)
class BLRConfig(StorageSettings, QuantizationConfigMixin):
    """How a model is compressed; saved in its `config.json` under `quantization_config`.

    Every field is checked when a config is made. `help(BLRConfig)` and the documentation list them.

    Raises:
        ValueError: for values of the wrong type or out of range, unknown keys, or a version newer than this package
            reads.
    """

    quant_method: str = field(default=QUANT_METHOD, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # transformers writes this key and hands it back
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r} for a BLRConfig, got {self.quant_method!r}")
        if not isinstance(self.version, int) or self.version > FORMAT_VERSION:
            raise ValueError(
                f"this config has format version {self.version!r}, this hf_blr reads up to {FORMAT_VERSION}: "
                "upgrade hf_blr"
            )
        check_fields("", vars(self), {f.name: f.metadata["check"] for f in option_fields()})
        if self.num_blocks is not None:
            self.num_blocks = as_block_pair(self.num_blocks)
        self.overrides = {pattern: dict(values) for pattern, values in (self.overrides or {}).items()}
        if isinstance(self.dataset, os.PathLike):
            self.dataset = os.fspath(self.dataset)
        self.validate()

    @classmethod
    def keys(cls) -> list[str]:
        """The names that the constructor takes."""
        return list(KEYS)

    def validate(self) -> None:
        """What fields mean together. Raises ValueError."""
        planned = bool(self.layers)
        sized = planned or self.bits_per_weight is not None
        check_budget("BLRConfig", {key: getattr(self, key) for key in SIZE_KEYS}, sized)
        for pattern, values in (self.overrides or {}).items():
            where = f"overrides[{pattern!r}]"
            takes = (*SIZE_KEYS, *FORMAT_KEYS)
            unknown = sorted(set(values) - set(takes))
            if unknown:
                raise ValueError(f"{where} has no {unknown}; it takes {list(takes)}")
            checks = {"ratio": options.ratio, "rank": integer(1, optional=True), **FORMAT_CHECKS}
            check_fields(f"{where}: ", values, {key: check for key, check in checks.items() if key in values})
            check_budget(where, self.settings_with(values), planned)
            if values.get("num_blocks") is not None:
                values["num_blocks"] = as_block_pair(values["num_blocks"])
        check_storage(self)
        check_together(self, planned)
        check_dataset(self.dataset, planned)

    def settings_with(self, override: dict[str, Any]) -> dict[str, Any]:
        """structure, ratio, rank and num_blocks, with the override's values in place of the config's own."""
        settings = {key: getattr(self, key) for key in SIZE_KEYS}
        if override.get("ratio") is not None:
            settings["rank"] = None
        if override.get("rank") is not None:
            settings["ratio"] = None
        if override.get("structure", self.structure) != self.structure:
            # block counts of one structure mean little for another
            settings["num_blocks"] = None
            if structure_named(override["structure"]).whole:
                settings["ratio"] = settings["rank"] = None
        settings |= {key: value for key, value in override.items() if key in SIZE_KEYS}
        # holds the layer's place in the plan until its structure is chosen; any size can be low-rank
        return settings | ({"structure": "low_rank"} if settings["structure"] == AUTO else {})

    @property
    def calibrated(self) -> bool:
        """Whether the fit looks at activations."""
        return self.dataset is not None

    @property
    def shares_budget(self) -> bool:
        """Whether a calibrated fit shares `ratio` out over the layers."""
        return self.fisher and self.ratio is not None and self.allocation != "uniform"

    def fit_options(self, features: int, rows: int = 1) -> FitOptions:
        """What the fit of a layer of K features is told, which saw so many rows of calibration inputs, if any."""
        return FitOptions(self.fit_rounds, self.fit_tolerance, damping_of(self.damping, features, rows), self.seed)

    def device_for(self, weight: torch.Tensor) -> torch.device:
        """Where the fit of this weight runs."""
        if self.fit_device is not None:
            return torch.device(self.fit_device)
        if weight.device.type == "cpu" and torch.cuda.is_available():
            return torch.device("cuda")
        return weight.device

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; text that was passed in memory is described, not stored."""
        data = {key: copy.deepcopy(getattr(self, key)) for key in self.keys() if key != "dataset"}
        data["num_blocks"] = None if self.num_blocks is None else list(as_block_pair(self.num_blocks))
        for values in data["overrides"].values():
            if values.get("num_blocks") is not None:
                values["num_blocks"] = list(values["num_blocks"])
        return {**data, "dataset": stored_dataset(self.dataset), "quant_method": QUANT_METHOD}

    # transformers 5.0 calls this before it exists in its own base class
    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BLRConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def option_fields() -> list[Any]:
    """The fields that a user sets, in their order."""
    return [f for f in fields(BLRConfig) if "help" in f.metadata]


#: a constant, as torch.compile does not follow `fields`: some models write their config out in a forward
KEYS = tuple(f.name for f in option_fields())


def naming_unknown(init: Any) -> Any:
    """The constructor with an error for unknown keys that lists the known ones."""

    @functools.wraps(init)
    def __init__(self: BLRConfig, *args: Any, **values: Any) -> None:
        unknown = sorted(set(values) - {*self.keys(), "quant_method"})
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.keys(), 1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"BLRConfig has no {unknown}{meant}; it takes {sorted(self.keys())}")
        init(self, *args, **values)

    return __init__


BLRConfig.__init__ = naming_unknown(BLRConfig.__init__)  # type: ignore[method-assign]
BLRConfig.__doc__ = (BLRConfig.__doc__ or "").replace(
    "\n    Raises:",
    "\n    Args:\n" + "".join(f"        {f.name}: {f.metadata['help']}\n" for f in option_fields()) + "\n    Raises:",
)
