"""Thousands of forwards, hundreds of saves, kills and full disks; `make test-long` runs as many as the table says."""

import os
import subprocess

import endurance
import pytest

#: bytes that a process may hold more at the end: a leak of one tiny model a round takes more
MOST = 20_000_000


def check(name, times, folder):
    found = endurance.RUNS[name][1](times, folder)
    assert found["tried"] >= times and found["wrong"] == 0
    assert found.get("grew_bytes", 0) < MOST


@pytest.mark.parametrize("name, times", [("forwards", 160), ("rounds", 14), ("threads", 10)])
def test_a_short_run_ends_with_the_same_bits(name, times, tmp_path):
    check(name, times, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in endurance.RUNS if name != "full disks"])
def test_a_long_run_ends_with_the_same_bits(name, tmp_path):
    check(name, endurance.RUNS[name][2], tmp_path)


@pytest.mark.long
def test_full_disks_are_said_in_a_line_and_leave_what_was_there(tmp_path):
    tried = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    subprocess.run(["umount", str(tmp_path)], check=True)
    check("full disks", 3, tmp_path)
