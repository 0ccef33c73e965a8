"""Which implementation runs: `use_impl` of several threads at once and left in any order, and `impl` of a module."""

import copy
import operator
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_blr import ops
from hf_blr.linear import BLRLinear
from hf_blr.structures import structures

TOKENS = 3


@pytest.fixture(autouse=True)
def as_found():
    """What one test leaves behind is not taken for another's."""
    torch._dynamo.reset()
    assert ops.current_impl() == "auto"
    yield
    torch._dynamo.reset()


def module_for(structure="low_rank"):
    blocks = (1, 1) if structure in ("low_rank", "pivoted") else (2, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BLRLinear.from_spec(structures()[structure].spec(8, 12, 4, blocks), dtype=torch.float64)


def flops(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


def impl_of(module) -> str:
    """The implementation that a call of the module runs, told by its number of operations."""
    x = torch.randn(TOKENS, 8, dtype=torch.float64)
    structure = module.spec.structure
    counts = {
        flops(ops.linear, structure, x, list(module.tensors().values()), impl=i): i for i in ("reference", "dense")
    }
    assert len(counts) == 2
    return counts[flops(module, x)]


class Graphs:
    """A backend of `torch.compile` that notes of each graph whether it multiplies factors out."""

    def __init__(self):
        self.dense = []

    def __call__(self, graph, inputs):
        self.dense.append(any(node.target is operator.matmul for node in graph.graph.nodes))
        return graph


def in_thread(function):
    """What a function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("impls", [("reference", "dense"), ("dense", "dense"), ("auto", "reference")])
def test_a_context_left_before_a_later_one_takes_back_its_own(impls):
    first, second = map(ops.use_impl, impls)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ops.current_impl() == impls[1]
    second.__exit__(None, None, None)
    assert ops.current_impl() == "auto"


def test_of_several_that_ask_for_the_same_each_takes_back_its_own():
    contexts = [ops.use_impl(impl) for impl in ("dense", "reference", "dense")]
    for context in contexts:
        context.__enter__()
    contexts[2].__exit__(None, None, None)
    assert ops.current_impl() == "reference"
    contexts[0].__exit__(None, None, None)
    assert ops.current_impl() == "reference"
    contexts[1].__exit__(None, None, None)
    assert ops.current_impl() == "auto"


def test_two_interleaved_threads_leave_the_default():
    entered, left = threading.Event(), threading.Event()
    seen = []

    def inner():
        with ops.use_impl("dense"):
            entered.set()
            assert left.wait(10)
            seen.append(ops.current_impl())
        seen.append(ops.current_impl())

    thread = threading.Thread(target=inner)
    with ops.use_impl("reference"):
        thread.start()
        assert entered.wait(10)
        # the process has one implementation: that of the context entered last
        assert ops.current_impl() == "dense"
    left.set()
    thread.join()
    assert seen == ["dense", "auto"]
    assert ops.current_impl() == "auto"


def test_many_threads_leave_the_default():
    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        contexts = []
        for choice in torch.randint(0, 4, (400,), generator=generator).tolist():
            if choice < 2 or not contexts:
                contexts.append(ops.use_impl(("reference", "dense")[choice % 2]))
                contexts[-1].__enter__()
            else:
                contexts.pop(0 if choice == 2 else -1).__exit__(None, None, None)
        for context in contexts:
            context.__exit__(None, None, None)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ops.current_impl() == "auto"


def test_an_error_inside_and_an_unknown_name_leave_nothing_behind():
    with pytest.raises(KeyError), ops.use_impl("dense"):
        raise KeyError
    assert ops.current_impl() == "auto"
    with ops.use_impl("reference"):
        with pytest.raises(ValueError, match="impl must be one of"), ops.use_impl("cuda"):
            pass
        assert ops.current_impl() == "reference"
    assert ops.current_impl() == "auto"


def test_compiled_code_follows_with_one_graph_for_each_implementation():
    module, graphs = module_for(), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    x = torch.randn(TOKENS, 8, dtype=torch.float64)
    expected = module(x)
    # more rounds than recompilations are allowed, at several depths
    for _ in range(10):
        for impls in (("dense",), ("reference",), ("reference", "dense"), ("dense", "reference")):
            contexts = [ops.use_impl(impl) for impl in impls]
            for context in contexts:
                context.__enter__()
            torch.testing.assert_close(compiled(x), expected)
            for context in contexts:
                context.__exit__(None, None, None)
    assert graphs.dense == [True, False]


def test_compiled_code_sees_a_context_of_another_thread():
    module, graphs = module_for(), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    x = torch.randn(TOKENS, 8, dtype=torch.float64)
    compiled(x)
    with ops.use_impl("dense"):
        torch.testing.assert_close(in_thread(lambda: compiled(x)), module(x))
    assert graphs.dense == [False, True]


def test_a_context_can_be_compiled():
    module, graphs = module_for(), Graphs()

    @torch.compile(fullgraph=True, backend=graphs)
    def function(x):
        with ops.use_impl("dense"):
            return module(x)

    x = torch.randn(TOKENS, 8, dtype=torch.float64)
    torch.testing.assert_close(function(x), module(x))
    with ops.use_impl("reference"):
        function(x)
        assert ops.current_impl() == "reference"
    assert ops.current_impl() == "auto"
    assert all(graphs.dense)


@pytest.mark.parametrize("structure", structures())
def test_a_module_has_an_implementation_of_its_own(structure):
    module, other = module_for(structure), module_for(structure)
    assert impl_of(module) == "reference"
    module.impl = "dense"
    assert impl_of(module) == "dense" and impl_of(other) == "reference"
    assert in_thread(lambda: impl_of(module)) == "dense"
    with ops.use_impl("reference"):
        assert impl_of(module) == "dense"
    module.impl = "reference"
    with ops.use_impl("dense"):
        assert impl_of(module) == "reference" and impl_of(other) == "dense"
        for nothing in ("", None):
            module.impl = nothing
            assert impl_of(module) == "dense"
    # no kernel computes in float64: an unmet wish is not passed over in silence
    module.impl = "triton"
    with pytest.raises(RuntimeError, match='impl="triton" cannot run'):
        impl_of(module)


def test_a_modules_implementation_is_checked_and_goes_with_a_copy_but_not_into_a_file():
    module = module_for()
    module.impl = "cuda"
    with pytest.raises(ValueError, match="impl must be one of"):
        impl_of(module)
    module.impl = "dense"
    assert impl_of(copy.deepcopy(module)) == "dense"
    assert set(module.state_dict()) == {"u", "v", "bias"}


def test_compiled_code_follows_a_module():
    module, graphs = module_for(), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    x = torch.randn(TOKENS, 8, dtype=torch.float64)
    for impl in ("", "dense", "", "dense"):
        module.impl = impl
        torch.testing.assert_close(compiled(x), module(x))
    assert graphs.dense == [False, True]
