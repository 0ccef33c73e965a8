"""vLLM's own model classes and loader on the CPU, without its server; also one process of several, as a program.

Real are the config, the loader, the linear layers and the model's forward. The wheel for GPUs has no attention for the
CPU: PyTorch's stands in, over one sequence. Other kernels of vLLM's run in their plain form (`custom_ops=["none"]`).
"""

import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

import torch
import torch.nn.functional as F
from vllm import platforms
from vllm.config import (
    CompilationConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms.cpu import CpuPlatform

from hf_blr.integration.vllm import method, register

# a wheel for GPUs finds no platform on a machine without one
platforms._current_platform = CpuPlatform()

#: what the processes write into a checkpoint's folder
OUT = "logits.pt"


def configured(folder, size=1, load_format="auto", **compilation):
    """vLLM's config for a checkpoint, served by so many processes; eager unless there is more to say."""
    register()
    model = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        enforce_eager=not compilation,
    )
    return VllmConfig(
        model_config=model,
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(load_format=load_format),
        parallel_config=ParallelConfig(tensor_parallel_size=size, distributed_executor_backend="external_launcher"),
        compilation_config=CompilationConfig(custom_ops=["none"], **compilation),
    )


@contextmanager
def serving(meeting, rank=0, size=1):
    """One process of a server, which meets the others in this file; without GPUs there is no memory to give back."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.accelerator.empty_cache"))
        stack.enter_context(set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))))
        init_distributed_environment(size, rank, f"file://{meeting}", rank, "gloo")
        initialize_model_parallel(size)
        stack.callback(cleanup_dist_env_and_memory)
        yield


def loaded(config):
    """The model, with the checkpoint's weights."""
    with set_current_vllm_config(config):
        model = get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            module.forward = attention(module.head_size)
    return model


def attention(head_size):
    """Causal attention over one sequence q, k, v `[T, heads * head_size]`."""

    def forward(q, k, v, *_, **__):
        heads = [t.unflatten(-1, (-1, head_size)).transpose(0, 1) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)

    return forward


def logits(model, config, ids):
    """`[T, vocabulary]` for one sequence of token ids `[T]`."""
    with torch.inference_mode(), set_current_vllm_config(config), set_forward_context(None, config):
        return model.compute_logits(model(ids, torch.arange(len(ids))))


def main(folders, meeting, ids, rank, size):
    """One of `size` processes, for each checkpoint in a folder; the first writes its logits beside it.

    With them go the widths of what the layers' methods summed over the processes themselves.
    """
    torch.set_num_threads(1)
    widths, reduce = [], method.tensor_model_parallel_all_reduce

    def noted(tensor):
        widths.append(tensor.shape[-1])
        return reduce(tensor)

    method.tensor_model_parallel_all_reduce = noted
    with serving(meeting, int(rank), int(size)):
        for folder in sorted(Path(folders).iterdir()):
            config = configured(folder, int(size))
            found = logits(loaded(config), config, torch.load(ids))
            if rank == "0":
                torch.save((found, widths.copy()), folder / OUT)
            widths.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
