"""How far a compression has come, read from its journal while it runs or after it was stopped."""

from __future__ import annotations

from pathlib import Path

from hf_blr.compression.journal.files import read_json
from hf_blr.compression.journal.folder import ABOUT, BEGINNING, SAID, START, TEXT, names_in
from hf_blr.config.texts import describe


def status_of(folder: str | Path) -> str:
    """In a few lines. Raises ValueError if the folder holds no journal."""
    folder = Path(folder)
    if not (folder / ABOUT).exists():
        raise ValueError(f"{folder} holds no journal: none was begun there, or its compression is complete")
    about = read_json(folder / ABOUT, SAID)
    config, layers = about["config"], names_in(folder / "layers")
    text = "batches of the caller's" if about["batches"] else describe(config["dataset"])
    lines = [f"{about['model']['class']} to {config['structure']}, fitted to {text}"]
    if not about["batches"] and config["dataset"] is not None:
        lines.append("text: " + ("drawn" if (folder / TEXT).exists() else "not drawn yet"))
    if not (folder / START).exists():
        return "\n".join([*lines, "the first fit has not begun: the dense model is looked at, and the budget shared"])
    plan = read_json(folder / START, BEGINNING)["plan"]
    # experts are fitted one by one, and layers that stay dense may be moved
    total = sum(max(layer.get("experts", 0), 1) for layer in plan.values())
    done = sum(name in plan or name.rpartition(".")[0] in plan for name in layers)
    lines.append(f"{done} of {total} layers are fitted; {len(names_in(folder / 'blocks'))} blocks are complete")
    return "\n".join(lines)
