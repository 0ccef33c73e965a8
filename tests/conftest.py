"""What all tests share. Without a GPU the kernels run under Triton's interpreter, set before Triton is imported."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# tests that start a process of their own test this package there too, whatever copy of it the environment has installed
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])])


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """Every buffer a launcher allocates starts as NaN, so that what no kernel writes shows."""

    def poisoned(allocate):
        def allocated(*args, **kwargs):
            found = allocate(*args, **kwargs)
            # indices and counts have no NaN
            return found.fill_(float("nan")) if found.is_floating_point() else found

        return allocated

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def default_dtype_stays():
    """What a test leaves behind would fail in others, which run in the same process."""
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32


def pytest_collection_modifyitems(config, items):
    """Tests that are marked as long run where they are asked for, and nowhere else."""
    if "long" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


#: modules that a library may import late, until what they hold is frozen as well
MODULES = 200
_frozen = 0


def freeze():
    """What imports have left is not looked through again: not by the collector, nor by who asks it for all models.

    Every compression asks it, and among a million objects it takes half a second to find them.
    """
    global _frozen
    gc.collect()
    gc.freeze()
    _frozen = len(sys.modules)


def pytest_collection_finish(session):
    freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between files, where no model is alive."""
    if (nextitem is None or nextitem.path != item.path) and len(sys.modules) > _frozen + MODULES:
        freeze()


def pytest_sessionfinish(session):
    """Libraries take what is still frozen at the end for leaked."""
    gc.unfreeze()
