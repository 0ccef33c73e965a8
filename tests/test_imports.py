"""The house rules that can be checked: what imports what, and what `import hf_blr` costs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder):
    """The exit status and output of import-linter on the package in a folder."""
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path):
    """A copy of the package and of its import rules."""
    shutil.copytree(ROOT / "hf_blr", tmp_path / "hf_blr", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_downward():
    status, output = lint(ROOT)
    assert status == 0, output


@pytest.mark.parametrize(
    "module, line, broken",
    [
        ("structures/spec.py", "from hf_blr import cli", "A room imports from rooms below it"),
        ("linear.py", "def late():\n    import hf_blr.bench", "A room imports from rooms below it"),
        ("structures/record.py", "import torch", "Sizes and records need nothing"),
        ("ops/dispatch.py", "import hf_blr", "Nobody below the bench"),
        ("ops/triton/mix.py", "from hf_blr.ops import blocks", "Kernels know no plain form"),
        ("ops/rules/mix.py", "import triton", "Rules are pure"),
        ("linear.py", "from hf_blr.structures.blast import layer", "reached through its record alone"),
        ("plan/layers.py", "import transformers", "What knows transformers says so"),
    ],
)
def test_an_import_upward_is_found(copied, module, line, broken):
    file = copied / "hf_blr" / module
    file.write_text(f"{file.read_text()}\n{line}\n")
    status, output = lint(copied)
    assert status != 0 and f"{broken}" in output.partition("Broken contracts")[2], output


def test_everything_but_the_kernels_works_without_triton_and_touches_no_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hf_blr\n"
        "from hf_blr import BLRConfig, compress, ops\n"
        "model = torch.nn.Sequential(torch.nn.Linear(16, 16))\n"
        "compress(model, BLRConfig('blast', ratio=0.6, num_blocks=2), progress=False)\n"
        "print(model(torch.ones(1, 16)).shape, torch.cuda.is_initialized())\n"
        "ops.low_rank_linear(torch.ones(2, 4), torch.ones(3, 1), torch.ones(1, 4), impl='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([1, 16]) False" in done.stdout, done.stderr
    assert "Triton is not installed" in done.stderr


def test_an_old_triton_is_not_used_and_named(monkeypatch):
    from hf_blr.ops import dispatch

    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: "3.5.1")
    assert dispatch.triton_problem() == "the kernels need Triton 3.6, 3.5.1 is installed"
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: "3.10.0")
    assert dispatch.triton_problem() is None


def test_every_public_name_is_there():
    import hf_blr

    for name in hf_blr.__all__:
        assert getattr(hf_blr, name) is not None
    assert callable(hf_blr.compress) and callable(hf_blr.perplexity)
    with pytest.raises(AttributeError, match="nonsense"):
        hf_blr.nonsense  # noqa: B018


def test_every_lazy_name_is_known_to_a_type_checker():
    """What `hf_blr.__all__` names, what is looked up lazily and what a type checker sees are the same."""
    import ast

    import hf_blr

    tree = ast.parse((ROOT / "hf_blr" / "__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_blr._HOMES
    assert {*seen, "__version__"} == set(hf_blr.__all__)
