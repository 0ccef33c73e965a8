"""The memory that is left to a process, on a machine or in a control group."""

from types import SimpleNamespace

import psutil
import pytest

from hf_blr.calibration import host


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One with 60 of 100 bytes available, and in no group."""
    memory = SimpleNamespace(total=100, available=60)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "membership")


def group(path, limit, used, cached, version, membership):
    """A group in whose memory so much is cached files."""
    names = {1: host.VERSION_1, 2: host.VERSION_2}[version]
    folder = host.ROOT / ("memory" if version == 1 else "") / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names.limit).write_text(f"{limit}\n")
    (folder / names.used).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 0\n{names.cached[0]} {cached}\nanon 3\n")
    host.MEMBERSHIP.write_text(membership)


def test_half_of_a_machine_stays_free(machine):
    assert host.host_memory() == (100, 60)
    assert host.host_has_room(10) and not host.host_has_room(11)


@pytest.mark.parametrize(("version", "line"), [(1, "4:memory:/a/b\n3:cpuset:/\n0::/\n"), (2, "0::/a/b\n")])
def test_half_of_a_control_group_stays_free(machine, version, line):
    group("a/b", 40, 25, 15, version, line)
    assert host.host_memory() == (40, 30)
    assert host.host_has_room(10) and not host.host_has_room(11)


@pytest.mark.parametrize(("version", "line"), [(1, "4:memory:/a/b\n"), (2, "0::/a/b\n")])
def test_the_groups_around_a_group_count(machine, version, line):
    # inside a container the own folder is not to be seen
    group("", 50, 20, 0, version, line)
    assert host.host_memory() == (50, 30)
    group("a", 30, 10, 5, version, line)
    assert host.host_memory() == (30, 25)


@pytest.mark.parametrize(
    ("version", "line", "limit"), [(1, "4:memory:/\n", 2**63 - 4096), (2, "0::/\n", "max")], ids=["1", "2"]
)
def test_a_group_without_a_limit_leaves_the_machine(machine, version, line, limit):
    group("", limit, 90, 0, version, line)
    assert host.host_memory() == (100, 60)
