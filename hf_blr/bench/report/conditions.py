"""What a result file says about itself: the kind of its rows, its card, and under which conditions they hold."""

from __future__ import annotations

from hf_blr.roofline.devices import MEASURED, Peaks

#: fields by which rows are told apart: all of them are there
KINDS = {
    "layers": ("us", "impl", "speedup_vs_dense"),
    "groups": ("group", "how", "speedup_vs_dense"),
    "models": ("measurement", "model"),
    "quality": ("dense_ppl",),
}


def kind_of(result: dict) -> str | None:
    """ "layers", "groups", "models" or "quality"; None for rows of another kind, which are shown as they are.

    So are those of a file that says under "varied" in what else its rows differ: they must not be compared as if they
    did not.
    """
    rows = result["rows"]
    if result.get("varied"):
        return None
    return next((kind for kind, names in KINDS.items() if rows and all(name in rows[0] for name in names)), None)


def protocol_of(result: dict) -> str:
    """What the file says on how it was measured, in sentences."""
    said = [result.get(name) for name in ("dtype", "protocol", "conditions")]
    return " ".join(f"{text.rstrip('.')}." for text in said if text)


def where_of(result: dict, commit: str = "") -> str:
    """Card, versions, commit and date; `commit` is the file's own if left out."""
    where = result.get("environment", {})
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "transformers") if where.get(name)]
    commit = (commit or where.get("commit") or "")[:7]
    parts = [where.get("device"), *versions, f"commit {commit}" if commit else None, where.get("date")]
    return ", ".join(part for part in parts if part) + "."


def card_of(result: dict) -> str:
    return result.get("environment", {}).get("device", "")


def measured_peaks(card: str) -> Peaks | None:
    """Those that were measured on such a card, None where none were."""
    return next((found for name, found in MEASURED.items() if name.removesuffix("-measured") in card), None)
