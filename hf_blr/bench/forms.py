"""The forms in which a model runs: as it is, as a CUDA graph, compiled.

Dense and compressed models get the same forms. torch.compile of a whole decoder takes half a minute for each shape
of the input; compiling one repeated block, or its norms and MLPs, takes seconds, and the graph around it takes away
what launches cost. `one_block` compiles the block of a decoding step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

#: eager: no graph. graph: a CUDA graph of the eager kernels. compiled: repeated blocks under torch.compile in a CUDA
#: graph (decoding, where blocks cannot share one compilation: norms and MLPs). whole: torch.compile of the whole model
#: with its own CUDA graphs
FORMS = ("eager", "graph", "compiled", "whole")
MODES = ("default", "max-autotune")
#: inside a graph of ours inductor must not make its own
INNER_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
WHOLE_MODES = {"default": "reduce-overhead", "max-autotune": "max-autotune"}


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of layers."""
    found = []
    for name, module in model.named_modules():
        *outer, last = name.split(".")
        if last.isdigit() and not any(part.isdigit() for part in outer):
            found.append(module)
    return found


def pieces_without_cache(model: nn.Module) -> list[nn.Module]:
    """Norms and MLPs: what the blocks hold that one compiled piece can serve in all of them.

    What decodes where whole blocks cannot share one (`one_block.why_not_one_block`).
    """
    return [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm", "MLP"))]


def compile_pieces(
    modules: list[nn.Module],
    mode: str,
    backend: str | Callable = "inductor",
    fullgraph: bool = False,
    forget: bool = True,
) -> list[Callable]:
    """The compiled call of each module, for `switched_on`; equal modules share one compilation.

    Args:
        mode: of `MODES`.
        backend: of torch.compile; modes are inductor's alone.
        fullgraph: fail where Python has to run between two graphs.
        forget: what was compiled before.
    """
    if forget:
        forget_compiled()
    options = inductor_options(mode) if backend == "inductor" else None
    calls: list[Callable] = []
    for module in modules:
        module.compile(dynamic=False, backend=backend, fullgraph=fullgraph, options=options)
        if module._compiled_call_impl is not None:
            calls.append(module._compiled_call_impl)
        module._compiled_call_impl = None
    return calls


def inductor_options(mode: str) -> dict:
    """What a mode stands for, and dependent launches: on Hopper a kernel then starts while the one before it ends.

    Inductor leaves them off by itself (PyTorch 2.11); its setting is newer than the oldest PyTorch that we run with.
    """
    import torch._inductor.config

    options = dict(torch._inductor.list_mode_options(INNER_MODES[mode]))
    if hasattr(torch._inductor.config.triton, "enable_pdl"):
        options["triton.enable_pdl"] = True
    return options


def forget_compiled() -> None:
    """What was compiled for other shapes counts towards the limit after which torch.compile gives up in silence."""
    torch._dynamo.reset()


@contextlib.contextmanager
def switched_on(modules: list[nn.Module], calls: list[Callable]) -> Iterator[None]:
    """Within this context the modules run compiled."""
    for module, call in zip(modules, calls, strict=True):
        module._compiled_call_impl = call
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def with_compiled_pieces(call: Callable, modules: list[nn.Module], mode: str) -> Callable:
    """`call`, during which the modules run compiled, and outside of which they do not."""
    calls = compile_pieces(modules, mode)

    def switched(**inputs: Any) -> Any:
        with switched_on(modules, calls):
            return call(**inputs)

    return switched
