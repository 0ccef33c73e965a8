"""Two processes that work together, joined by gloo."""

import multiprocessing
import os
from datetime import timedelta

import torch
import torch.distributed as dist

PROCESSES = 2
#: imported once, by the process that the others are forked from
IMPORTED = [
    "hf_blr.cli",
    "hf_blr.compression",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "mixtral", "t5")),
]


def start_together(work, folder):
    """Runs `work(rank, folder)` in each of them, and waits for both."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(work, (folder,), nprocs=PROCESSES, start_method="forkserver")


def join(rank, folder):
    """What each of them does first."""
    # the loopback device, whatever name this machine has for itself
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120))
