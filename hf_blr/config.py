"""`BLRConfig`: what to compress, into what, and fitted how."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_blr.factorize.options import FitOptions
from hf_blr.structures import as_block_pair, structure_named

QUANT_METHOD = "hf_blr"
#: bump when a checkpoint written before cannot be read as it is
FORMAT_VERSION = 1

#: the structure that stands for the best one for each layer
AUTO = "auto"
ALLOCATIONS = ("loss", "uniform")
OVERRIDE_KEYS = ("structure", "ratio", "rank", "num_blocks")


class BLRConfig(QuantizationConfigMixin):
    """How a model is compressed; saved in its `config.json` under `quantization_config`.

    Args:
        structure: "low_rank", "pivoted", "monarch" or "blast"; or "auto", which takes for each layer the structure,
            blocks and rank of the least predicted loss (it needs text, a `ratio` and `fisher`).
        ratio: kept / dense parameters of the replaced matrices, in (0, 1): of all of them together, or of each with
            `allocation="uniform"`. Give this or `rank`.
        rank: the rank of each replaced matrix; for Monarch, of each block pair.
        num_blocks: b or (input blocks, output blocks). Default: (4, 16) for BLAST, (4, 4) for Monarch.
        target_modules: which layers, in PEFT's vocabulary: a list of names or name endings, or a regular expression
            that the whole name must match. None or "all-linear": every attention and MLP projection inside the
            repeated blocks; never the head, embeddings, routers or tied weights.
        modules_to_not_convert: names or endings (or one regular expression) to leave dense.
        overrides: {pattern: {"structure" | "ratio" | "rank" | "num_blocks": ...}}; a pattern is a regular expression
            that an ending of the module's name must match; the first that does is used.
        dataset: text to fit to. None fits the weights alone; "builtin" (Python's own documentation), "wikitext2",
            "c4", a text file or a folder of them, a list of strings, or a `datasets.Dataset` fit the outputs on it.
        sequential: fit each layer on the inputs that the layers compressed before it give it, towards the dense
            model's outputs, instead of on the dense model's inputs. Needs a model that is a chain of blocks.
        block_steps: gradient steps that refine all factors of a block together once its layers are fitted; 0 for none.
            Needs text, and `sequential`.
        fisher: weigh errors in a layer's outputs by how much the model's loss feels them; costs one backward pass over
            the calibration text, and needs a model with logits.
        allocation: "loss" shares `ratio` out over the layers so that the predicted loss is least, and may leave some
            dense; "uniform" gives each its own `ratio`. None is "loss" where `fisher` weighs a calibrated fit of a
            `ratio`, else "uniform".
        num_samples: calibration windows to take at most.
        seqlen: tokens in a calibration window.
        fit_rounds: rounds of alternating least squares (BLAST) or block descent (Monarch) at most.
        fit_tolerance: stop when a round lowers the squared error by less than this fraction.
        damping: added to the diagonal of each input Gram matrix, as a fraction of its mean.
        fit_device: where the fits run; None is the weight's device, or "cuda" if there is one and the weight is on
            the CPU.
        seed: of the calibration windows and of the fits' starting points.
        layers: the resolved plan, {module: spec}; filled in by the compression and read back from a checkpoint.
        version: of this format.

    Raises:
        ValueError: for values out of range, unknown keys, or a version newer than this package reads.
    """

    def __init__(
        self,
        structure: str = "blast",
        ratio: float | None = None,
        rank: int | None = None,
        num_blocks: int | tuple[int, int] | None = None,
        target_modules: str | list[str] | None = None,
        modules_to_not_convert: str | list[str] | None = None,
        overrides: dict[str, dict] | None = None,
        dataset: Any = None,
        sequential: bool = True,
        fisher: bool = True,
        allocation: str | None = None,
        block_steps: int = 0,
        num_samples: int = 128,
        seqlen: int = 2048,
        fit_rounds: int = 16,
        fit_tolerance: float = 3e-3,
        damping: float = 1e-4,
        fit_device: str | None = None,
        seed: int = 0,
        layers: dict[str, dict] | None = None,
        version: int = FORMAT_VERSION,
        **unknown,
    ):
        # transformers writes this key and hands it back
        method = unknown.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r} for a BLRConfig, got {method!r}")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"this config has format version {version!r}, this hf_blr reads up to {FORMAT_VERSION}: upgrade hf_blr"
            )
        if unknown:
            raise ValueError(f"BLRConfig has no {sorted(unknown)}; it takes {sorted(self.keys())}")
        self.quant_method = QUANT_METHOD
        self.structure = structure
        self.ratio = ratio
        self.rank = rank
        self.num_blocks = None if num_blocks is None else as_block_pair(num_blocks)
        self.target_modules = target_modules
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides = {pattern: dict(values) for pattern, values in (overrides or {}).items()}
        self.dataset = os.fspath(dataset) if isinstance(dataset, os.PathLike) else dataset
        self.sequential = sequential
        self.fisher = fisher
        self.allocation = allocation
        self.block_steps = block_steps
        self.num_samples = num_samples
        self.seqlen = seqlen
        self.fit_rounds = fit_rounds
        self.fit_tolerance = fit_tolerance
        self.damping = damping
        self.fit_device = fit_device
        self.seed = seed
        self.layers = layers
        self.version = version
        self.validate()

    @classmethod
    def keys(cls) -> list[str]:
        """The names that the constructor takes."""
        code = cls.__init__.__code__
        return list(code.co_varnames[1 : code.co_argcount])

    def validate(self):
        check_budget("BLRConfig", {"structure": self.structure, "ratio": self.ratio, "rank": self.rank})
        for pattern, values in self.overrides.items():
            unknown = sorted(set(values) - set(OVERRIDE_KEYS))
            if unknown:
                raise ValueError(f"overrides[{pattern!r}] has no {unknown}; it takes {list(OVERRIDE_KEYS)}")
            check_budget(f"overrides[{pattern!r}]", self.settings_with(values))
            if values.get("num_blocks") is not None:
                values["num_blocks"] = as_block_pair(values["num_blocks"])
        for name, least in (("num_samples", 1), ("seqlen", 2), ("fit_rounds", 1), ("block_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("fit_tolerance", "damping"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        for name in ("sequential", "fisher"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.block_steps and not self.sequential:
            raise ValueError("block_steps refine what sequential fits leave: set sequential=True, or block_steps=0")
        if self.allocation not in (None, *ALLOCATIONS):
            raise ValueError(f"allocation must be one of {ALLOCATIONS} or None, got {self.allocation!r}")
        if self.structure == AUTO and (not self.shares_budget or self.num_blocks is not None):
            raise ValueError(
                'structure="auto" shares out a ratio by Fisher information and chooses the blocks: set ratio, leave '
                "num_blocks out, and allocation and fisher as they are"
            )
        if self.allocation == "loss" and (self.ratio is None or not self.fisher):
            raise ValueError('allocation="loss" shares out a ratio by Fisher information: set ratio, and fisher=True')
        texts = (
            self.dataset is None
            or isinstance(self.dataset, (str, list, tuple))
            or hasattr(self.dataset, "column_names")
        )
        if not texts:
            raise ValueError(
                "dataset must be None, a name, a path, a list of strings or a datasets.Dataset, "
                f"got {type(self.dataset).__name__}"
            )

    def settings_with(self, override: dict) -> dict:
        """structure, ratio, rank and num_blocks, with the override's values in place of the config's own."""
        settings = {key: getattr(self, key) for key in OVERRIDE_KEYS}
        if override.get("ratio") is not None:
            settings["rank"] = None
        if override.get("rank") is not None:
            settings["ratio"] = None
        if override.get("structure", self.structure) != self.structure:
            # block counts of one structure mean little for another
            settings["num_blocks"] = None
        settings |= override
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

    @property
    def fit_options(self) -> FitOptions:
        """What every fit is told."""
        return FitOptions(self.fit_rounds, self.fit_tolerance, self.damping, self.seed)

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
        data["num_blocks"] = None if self.num_blocks is None else list(self.num_blocks)
        for values in data["overrides"].values():
            if values.get("num_blocks") is not None:
                values["num_blocks"] = list(values["num_blocks"])
        dataset = self.dataset
        if dataset is not None and not isinstance(dataset, str):
            dataset = f"<{type(dataset).__name__} of {len(dataset)} texts>"
        return {**data, "dataset": dataset, "quant_method": QUANT_METHOD}

    # transformers 5.0 calls this before it exists in its own base class
    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __eq__(self, other):
        return isinstance(other, BLRConfig) and self.to_dict() == other.to_dict()

    __hash__ = None


def check_budget(where: str, settings: dict):
    """Raises ValueError unless `settings` names a structure and exactly one of ratio and rank, in range."""
    try:
        if settings["structure"] != AUTO or where != "BLRConfig":
            structure_named(settings["structure"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    ratio, rank = settings["ratio"], settings["rank"]
    if (ratio is None) == (rank is None):
        raise ValueError(
            f"{where}: give exactly one of ratio (kept / dense parameters) and rank, "
            f"got ratio={ratio!r} and rank={rank!r}"
        )
    if ratio is not None and not (isinstance(ratio, (int, float)) and 0 < ratio <= 1):
        raise ValueError(f"{where}: ratio is kept / dense parameters and must be in (0, 1], got {ratio!r}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"{where}: rank must be an integer of at least 1, got {rank!r}")
