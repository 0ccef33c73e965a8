"""Where and with what a result was measured."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path

import torch

import hf_blr


def environment() -> dict:
    """Machine, versions, commit and date, as every result file carries them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": gpu or f"{processor_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "transformers": installed_version("transformers"),
        "hf_blr": hf_blr.__version__,
        "commit": commit(),
    }


def installed_version(package: str) -> str | None:
    """None where the package is missing; nothing is imported to find out."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The CPU's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The source checkout's commit, with a + if files were changed since; None outside a checkout."""
    import subprocess

    root = Path(hf_blr.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None
