"""What the tests themselves keep to."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_blr

TESTS = Path(__file__).parent
ROOT = TESTS.parent
#: `pythonpath`, but for the root itself
FOLDERS = [ROOT / name for name in ("tests", "benchmarks", "experiments")]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_no_file_of_the_tests_is_imported_twice(path):
    """Helpers by the one name that `pythonpath` in pyproject.toml gives them, and test modules by pytest alone."""
    for name in imports_of(path):
        top = name.partition(".")[0]
        assert top not in ("tests", "benchmarks", "experiments") and not top.startswith((".", "test_")), name
    assert path == Path(__file__) or "sys.path" not in path.read_text()


def test_one_name_holds_each_file():
    """Of all that is imported by now: in a run of the whole suite, every test module and every helper."""
    names = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if (
            name != "__main__"
            and file
            and any(Path(file).parent == ROOT / d for d in ("tests", "benchmarks", "experiments"))
        ):
            names.setdefault(file, set()).add(name)
    assert __file__ in names
    assert not [found for found in names.values() if len(found) > 1]


def test_the_package_under_test_is_the_one_beside_the_tests():
    assert Path(hf_blr.__file__).parent == ROOT / "hf_blr"
    command = [sys.executable, "-c", "import hf_blr; print(hf_blr.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=True)
    assert done.stdout.strip() == hf_blr.__file__


def test_fresh_memory_is_poisoned(poisoned_buffers):
    like = torch.zeros(3)
    for fresh in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty(3, dtype=torch.float16)):
        assert fresh.isnan().all()
    assert torch.empty(3, dtype=torch.int32).dtype == torch.int32
