"""Which parts of a model are calibrated at once: repeated blocks, and what stands alone between their lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_blr.calibration.calls import Batch, first, hooked, run, split_call


@dataclass
class Seen:
    """What a look at a model showed of the modules that hold target layers: which ran, and which changed the shape."""

    ran: set[str] = field(default_factory=set)
    reshaping: set[str] = field(default_factory=set)


def blocks_of(model: nn.Module, body: nn.Module, names: list[str], batches: list[Batch]) -> dict[str, list[str]]:
    """{block: its layers}, in the order of the model's modules; blocks between others come along without layers.

    A block is a numbered member of a list, `prefix.<number>`, the outermost one. A list whose members change the shape
    of the hidden states, as the stages of a vision model do, is opened: its members' own lists are taken. A layer in no
    list belongs to the outermost part of the model around it that holds no block.

    Args:
        body: what the batches run through, the model or a part of it.
        names: dense linear layers. Those in such places that no batch reaches may be left out.
    """
    if all(len(numbered(name)) == 1 for name in names):
        blocks = grouped(names, lambda name: numbered(name)[0])
    else:
        blocks = chosen(names, look(model, body, names, batches))
    return with_members_between(model, blocks)


def look(model: nn.Module, body: nn.Module, names: list[str], batches: list[Batch]) -> Seen:
    """Runs one batch of each kind of input through the model."""
    seen = Seen()

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.ran.add(name)
            entered, left = split_call(args, kwargs)[0], first(output)
            if entered is not None and torch.is_tensor(left) and left.shape != entered.shape:
                seen.reshaping.add(name)

        return see

    around = {part: model.get_submodule(part) for name in names for part in (*ancestors(name), name)}
    with hooked([module.register_forward_hook(hook(name), with_kwargs=True) for name, module in around.items()]):
        for batch in {frozenset(batch): batch for batch in reversed(batches)}.values():
            with torch.no_grad():
                run(body, batch)
    return seen


def chosen(names: list[str], seen: Seen) -> dict[str, list[str]]:
    """The blocks for layers that lie in several lists or in none."""
    opened = {
        list_of(block)
        for name in names
        for block, inner in zip(numbered(name), numbered(name)[1:], strict=False)
        if block in seen.reshaping and inner in seen.ran
    }
    found = {
        name: next((block for block in numbered(name) if block in seen.ran and list_of(block) not in opened), None)
        for name in names
        if name in seen.ran or any(part in seen.ran for part in ancestors(name))
    }
    blocks = set(found.values())

    def alone(name: str) -> str:
        parts = [part for part in (*ancestors(name), name) if part in seen.ran]
        return next(part for part in parts if not any(block and f"{block}.".startswith(f"{part}.") for block in blocks))

    return grouped(list(found), lambda name: found[name] or alone(name))


def with_members_between(model: nn.Module, blocks: dict[str, list[str]]) -> dict[str, list[str]]:
    """The blocks with those members of their lists that lie between them, which hand on the hidden states too."""
    filled: dict[str, list[str]] = {}
    for block, names in blocks.items():
        parent, number = list_of(block), block.rpartition(".")[2]
        if number.isdigit():
            before = [int(other.rpartition(".")[2]) for other in filled if list_of(other) == parent]
            for missing in range(max(before) + 1, int(number)) if before else ():
                if isinstance(model.get_submodule(parent), nn.ModuleList):
                    filled[f"{parent}.{missing}"] = []
        filled[block] = names
    return filled


def grouped(names: list[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def ancestors(name: str) -> list[str]:
    """`a.b.c` -> [`a`, `a.b`]."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def numbered(name: str) -> list[str]:
    """The members of lists around a layer, the outermost first."""
    return [part for part in ancestors(name) if part.rpartition(".")[2].isdigit()]


def list_of(block: str) -> str:
    """The list that holds a block; the block itself where it is in none."""
    parent, _, last = block.rpartition(".")
    return parent if last.isdigit() else block
