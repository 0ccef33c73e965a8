"""The house rules that can be checked: what imports what, and what `import hf_blr` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_blr"

#: from the top of the house to its ground: a file imports from rooms further down, or from its own
FLOORS = [
    ["cli", "__main__", "__init__"],
    ["bench"],
    ["integration", "compression"],
    ["evaluation", "finetune", "roofline"],
    ["checkpoint"],
    ["calibration"],
    ["text", "factorize"],
    ["plan"],
    ["targets"],
    ["config"],
    ["inference"],
    ["linear"],
    ["dense"],
    ["ops"],
    ["structures", "modes"],
]
MAY_IMPORT_TRANSFORMERS = (
    "checkpoint",
    "config",
    "dense",
    "inference",
    "integration",
    "finetune",
    "evaluation",
    "bench",
    "cli",
)


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def floor_of(module):
    """The index of the most particular entry that holds the module."""
    held = [
        (len(room), level)
        for level, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or module.startswith(room + ".")
    ]
    assert held, f"{module} has no floor"
    return max(held)[1]


def imported_modules(path):
    """(module, whether at the top of the file) of each import, in dotted form."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_downward(module):
    for imported, at_top in imported_modules(FILES[module]):
        if imported.startswith("hf_blr.") and at_top:
            target = imported.removeprefix("hf_blr.")
            same_room = target.split(".")[0] == module.split(".")[0]
            assert same_room or floor_of(target) >= floor_of(module), f"{module} imports {imported}"
        if imported.split(".")[0] == "transformers":
            assert module.split(".")[0] in MAY_IMPORT_TRANSFORMERS, f"{module} imports transformers"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_needs_no_triton_and_touches_no_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hf_blr\n"
        "from hf_blr import BLRConfig, compress\n"
        "model = torch.nn.Sequential(torch.nn.Linear(16, 16))\n"
        "compress(model, BLRConfig('blast', ratio=0.6, num_blocks=2), progress=False)\n"
        "print(model(torch.ones(1, 16)).shape, torch.cuda.is_initialized())"
    )
    done = run(code)
    assert "torch.Size([1, 16]) False" in done.stdout, done.stderr


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
