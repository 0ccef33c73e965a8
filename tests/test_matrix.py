"""Every tool on every architecture: a few of them in `make test`, all in `make test-long`."""

from pathlib import Path

import pytest
import tools
from matrix import CHECKS, NEITHER, NOTHING, YES, Case, cell, row
from zoo_models import KINDS, LEFT_OUT

#: one for each kind of model, and the tools whose way differs between these most
QUICK = {
    "llama": ["compress", "save and load", "train", "generate", "static cache", "compile", "fuse"],
    "mixtral": ["compress", "save and load", "generate"],
    "t5": ["compress", "save and load", "checkpointing", "static cache"],
    "vit": ["compress", "calibrate", "export"],
}


def failures(found):
    return {column: said for column, said in found.items() if column in CHECKS and said not in (YES, NOTHING, NEITHER)}


@pytest.mark.parametrize("name", QUICK)
def test_the_tools_work_on_one_model_of_each_kind(name):
    found = row(name, QUICK[name])
    assert not failures(found)
    assert all(found[column] == YES for column in QUICK[name])


def test_a_check_that_fails_is_told_from_one_that_cannot_be(monkeypatch):
    case = Case("vit")
    assert cell(case, CHECKS["generate"]) == NOTHING
    # a compressed model that is not its dense twin
    model = case.compressed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case, "compressed", lambda: model)
        patch.setattr(case, "twin", lambda: case.dense)
        assert cell(case, CHECKS["compress"]).startswith("AssertionError: outputs differ by")


def test_every_tool_has_tests_that_are_counted(monkeypatch):
    here = Path(__file__).parent
    assert all((here / f"{test}.py").exists() for tool in tools.TOOLS.values() for test in tool.tests)
    monkeypatch.setitem(tools.TOOLS, "one", tools.Tool("pytest", ("test_plan",), "follow_peft"))
    monkeypatch.setitem(tools.TOOLS, "none", tools.Tool("no-such-package", ("test_plan",)))
    found = tools.row("one")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 0, 0) and found["version"] == pytest.__version__
    assert tools.row("none") is None


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_the_tools_work_on_every_model(name):
    if name in LEFT_OUT:
        pytest.skip(LEFT_OUT[name])
    assert not failures(row(name))
