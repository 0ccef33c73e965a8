"""Fields of a config that carry their help text, the check of their value, and their place on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from hf_blr.structures.spec import is_count

#: value -> None if it is right, else what was expected
Check = Callable[[Any], "str | None"]


def option(default: Any, help: str, check: Check, factory: Callable[[], Any] | None = None, **cli: Any) -> Any:
    """A dataclass field.

    Args:
        default: its value if left out; None stands for a `factory` of one.
        help: one sentence or more, for documentation and `--help`.
        check: called with the value when a config is made.
        cli: how the command line takes it: `flag` (none without), `group`, and keywords of `add_argument`.
    """
    metadata = {"help": help, "check": check, "cli": cli}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


def check_fields(where: str, values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raises ValueError that says which field was expected to be what, and what came."""
    for name, check in checks.items():
        expected = check(values[name])
        if expected is not None:
            raise ValueError(f"{where}{name} must be {expected}, got {values[name]!r}")


def integer(least: int | None = None, optional: bool = False) -> Check:
    def check(value: Any) -> str | None:
        if value is None and optional:
            return None
        if not is_count(value) or (least is not None and value < least):
            return "an integer" + (f" of at least {least}" if least is not None else "")
        return None

    return check


def fraction(value: Any) -> str | None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    return None if right else "in [0, 1)"


def optional_fraction(value: Any) -> str | None:
    return None if value is None or fraction(value) is None else "in [0, 1), or None"


def ratio(value: Any) -> str | None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
    return None if right or value is None else "kept / dense parameters, in (0, 1]"


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def one_of(*names: str | None) -> Check:
    """None among the names: the field may be left out."""
    shown = f"one of {tuple(name for name in names if name is not None)}" + " or None" * (None in names)
    return lambda value: None if value in names else shown


def anything(value: Any) -> str | None:
    return None


def text(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "a string or None"


def names_or_pattern(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None
    right = isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)
    return None if right else "a regular expression or a list of names"


def dict_of_dicts(value: Any) -> str | None:
    if value is None:
        return None
    right = isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, dict) for k, v in value.items())
    return None if right else "a dict of dicts, by name"


def facts(value: Any) -> str | None:
    """Of what a model card says: numbers, rows of a table, and text."""

    def right(name: str, fact: Any) -> bool:
        if name == "scores":
            return isinstance(fact, list) and all(isinstance(row, dict) for row in fact)
        if name in ("divergence", "calibration_tokens", "held_out_tokens"):
            return isinstance(fact, (int, float)) and not isinstance(fact, bool)
        return isinstance(fact, str)

    told = value is None or (isinstance(value, dict) and all(right(*each) for each in value.items()))
    return None if told else "a dict of numbers, text and scores, or None"
