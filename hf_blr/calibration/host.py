"""The memory of the host that this process may use: of the machine, or of the control group that it is held to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

#: where Linux shows the groups, and which of them a process is in
ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Names(NamedTuple):
    """Of the files of a group, and of the lines in `memory.stat` on what the system can take back."""

    limit: str
    used: str
    cached: tuple[str, str]


VERSION_1 = Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
VERSION_2 = Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def host_has_room(size: int) -> bool:
    """Whether half of the memory stays free beside so many bytes."""
    total, available = host_memory()
    return available - size >= total // 2


def host_memory() -> tuple[int, int]:
    """(all, available) bytes: the least that the machine and the groups around this process say."""
    machine = psutil.virtual_memory()
    everything, available = zip((machine.total, machine.available), *held_to(), strict=True)
    return min(everything), min(available)


def held_to() -> Iterator[tuple[int, int]]:
    """(limit, available) bytes of each group around this process that has a limit; none where there are no groups."""
    for folder, names in groups():
        limit = folder / names.limit
        if limit.exists() and (said := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(name, 0)) for name in names.cached)
            used = int((folder / names.used).read_text()) - cached
            yield int(said), int(said) - used


def groups() -> Iterator[tuple[Path, Names]]:
    """The folders of the groups that this process is in, from its own to the root; some do not exist in containers."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            root, names = (ROOT, VERSION_2) if not controllers else (ROOT / "memory", VERSION_1)
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root):
                    yield folder, names
