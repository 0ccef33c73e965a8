"""A user's code is checked against the public API, although `hf_blr` imports its parts when they are first used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_blr

ROOT = Path(__file__).parents[1]
LAZY = [name for name in hf_blr.__all__ if name != "__version__"]
#: {line: what mypy must say of it}
SAID = {
    "reveal_type(hf_blr.compress)": r'Revealed type is "def \(model: .*Module, config: .*BLRConfig, .*Report"',
    'hf_blr.BLRConfig(ratio="half")': r'Argument "ratio" to "BLRConfig" has incompatible type "str"',
    'hf_blr.BLRConfig("blast", ratio=0.5, ranks=3)': r'Unexpected keyword argument "ranks" for "BLRConfig"',
    "hf_blr.compress(torch.nn.Linear(2, 2))": r'Missing positional argument "config" in call to "compress"',
    "hf_blr.compres": r'Module has no attribute "compres"',
}
RIGHT = [
    'config = hf_blr.BLRConfig("blast", ratio=0.5, num_blocks=(4, 16), target_modules=["q_proj"])',
    "error: float = hf_blr.compress(torch.nn.Linear(2, 2), config).mean_rel_error",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """{line of a user's program: what mypy says of it}."""
    lines = ["import torch", "import hf_blr", *RIGHT, *SAID, *(f"reveal_type(hf_blr.{name})" for name in LAZY)]
    program = tmp_path_factory.mktemp("user") / "program.py"
    program.write_text("\n".join(lines) + "\n")
    # by the project's own settings, with which `make lint` has most of the answer in its cache
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-pretty", str(program)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "1000"}, capture_output=True, text=True)
    found = {line: "" for line in lines}
    for number, text in re.findall(r"program\.py:(\d+): (.*)", done.stdout):
        found[lines[int(number) - 1]] += text + "\n"
    assert any(found.values()), done.stdout + done.stderr
    return found


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "hf_blr" / "py.typed").exists()


@pytest.mark.parametrize("line", SAID)
def test_types_are_known_and_misuse_is_reported(said, line):
    assert re.search(SAID[line], said[line]), said[line]


@pytest.mark.parametrize("line", RIGHT)
def test_right_use_is_not_reported(said, line):
    assert not said[line]


@pytest.mark.parametrize("name", LAZY)
def test_no_name_is_any(said, name):
    revealed = said[f"reveal_type(hf_blr.{name})"]
    assert "Revealed type" in revealed and '"Any"' not in revealed, revealed
