"""Launch settings measured on this card, for those who ask: `hf_blr.tune`. Without that, the rules in `launch` hold.

What was measured is kept in a file for each card and release of Triton, and used from then on. Tokens enter its keys
by the power of two above them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import torch
import triton

from hf_blr.atomic import write_text_atomically
from hf_blr.ops.rules.columns import ColumnConfig
from hf_blr.ops.rules.device import pow2
from hf_blr.ops.rules.few_tokens import DecodeConfig, OneConfig
from hf_blr.ops.rules.float8 import Float8Config, Float8MixConfig
from hf_blr.ops.rules.mix import MixConfig
from hf_blr.ops.rules.packed import PlacesConfig
from hf_blr.ops.rules.products import GemmConfig

logger = logging.getLogger(__name__)

#: {kind of setting: changes to the rule's choice that are tried}; with the rule's own at most eight
CHANGES = {
    GemmConfig: (
        {"bn": 2, "warps": 2},
        {"bt": 2, "warps": 2},
        {"bt": 0.5},
        {"bn": 0.5},
        {"warps": 2},
        {"stages": 2},
        {"bk": 0.5},
    ),
    MixConfig: ({"bt": 2}, {"bt": 0.5}, {"br": 2}, {"br": 0.5}, {"warps": 2}, {"warps": 0.5}),
    Float8MixConfig: ({"bt": 2}, {"bt": 0.5}, {"ahead": 2}, {"ahead": 4}, {"programs": 2}, {"programs": 0.5}),
    ColumnConfig: ({"bt": 2}, {"bt": 0.5}, {"bc": 2}, {"bc": 0.5}, {"warps": 2}, {"warps": 0.5}),
    OneConfig: (
        {"rows": 2},
        {"rows": 2, "warps": 2},
        {"rows": 0.5, "warps": 0.5},
        {"programs": 2},
        {"programs": 0.5},
        {"length": 2},
    ),
    PlacesConfig: (
        {"tiles": 2},
        {"tiles": 0.5},
        {"parts": 2},
        {"parts": 0.5},
        {"parts": 2, "tiles": 0.5},
        {"parts": 0.5, "tiles": 2},
        {"splits": 2},
    ),
    DecodeConfig: (
        {"rows": 2},
        {"rows": 0.5},
        {"length": 2},
        {"length": 0.5},
        {"warps": 2},
        {"warps": 0.5},
        {"stages": 2},
    ),
}
CHANGES[Float8Config] = CHANGES[GemmConfig]
#: a change must be this much faster than the rule's choice, or noise would pick it
GAIN = 0.97

_tuning = False


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within this context, each kind of launch that was never measured is, and the result is kept."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def launch(run: Callable, kernel: str, rule, tokens: int, sizes: tuple[int, ...], like: torch.Tensor):
    """Call `run(config)` with the setting measured for this kind of launch, else with the rule's.

    Args:
        run: launches the kernel; it may be called several times.
        kernel: the launcher's name.
        rule: the setting that the rules give.
        tokens: enters the key by `pow2`.
        sizes: what else the best setting may depend on.
        like: a tensor on the device, in the dtype.
    """
    table = table_of(like.device)
    if not table and not _tuning:
        return run(rule)
    key = f"{kernel} {' '.join(map(str, (pow2(tokens), like.element_size(), *sizes)))}"
    found = table.get(key)
    if found is None and _tuning and not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        found = table[key] = list(astuple(fastest(run, candidates(rule))))
        save(table, file_of(like.device))
    return run(rule if found is None else type(rule)(*found))


def candidates(rule) -> list:
    """The rule's setting and up to seven near it."""
    found = [rule]
    for change in CHANGES[type(rule)]:
        values = {name: int(getattr(rule, name) * factor) for name, factor in change.items()}
        if min(values.values()) >= 1:
            found.append(replace(rule, **values))
    return found


def fastest(run: Callable, configs: list):
    """The first of the settings unless another is clearly faster; what does not compile or fit is passed over."""
    best, shortest = configs[0], seconds(lambda: run(configs[0])) * GAIN
    for config in configs[1:]:
        try:
            taken = seconds(lambda config=config: run(config))
        except (triton.CompilationError, triton.OutOfResources):
            continue
        if taken < shortest:
            best, shortest = config, taken
    return best


def seconds(call: Callable) -> float:
    """The median over calls with an empty L2."""
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median") / 1e3


@functools.cache
def table_of(device: torch.device) -> dict[str, list]:
    """{kind of launch: setting} measured on this device before."""
    try:
        return json.loads(file_of(device).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("launch settings in %s cannot be read and are not used: %s", file_of(device), error)
        return {}


def file_of(device: torch.device) -> Path:
    """Where settings measured on this device are kept; `HF_BLR_CACHE` names another folder."""
    folder = os.environ.get("HF_BLR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "hf_blr")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path(folder) / f"{name.replace(' ', '-')}-triton-{triton.__version__}.json"


def save(table: dict[str, list], path: Path):
    """Add the settings to the file, whole or not at all: other processes read and write it too."""
    with contextlib.suppress(OSError, ValueError):
        table = json.loads(path.read_text()) | table
    write_text_atomically(path, json.dumps(table, indent=0, sort_keys=True))
