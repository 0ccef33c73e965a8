"""Every tool beside Transformers itself: its tests, with the version that is installed: `python benchmarks/tools.py`.

Tools that are not installed here keep the row that they had, so that each environment adds its own. Some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))

from conditions import RESULTS

from hf_blr.bench.environment import environment
from hf_blr.bench.report.commits import rows_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Tool:
    """package: whose version counts. tests: files, and their tests of these words, as `pytest -k` has them; all if
    left out. not_done: what does not work, and why.
    """

    package: str
    tests: tuple[str, ...]
    words: str = ""
    not_done: str = ""


TOOLS = {
    "Trainer": Tool("transformers", ("test_finetune", "test_finetune_bf16", "test_resume")),
    "pipeline, generate": Tool("transformers", ("test_integration_use", "test_integration_keyword")),
    "transformers serve, over HTTP": Tool("fastapi", ("test_serve",)),
    "a load without this package": Tool(
        "transformers",
        ("test_notice",),
        not_done="with `attn_implementation=`, before Transformers 5.4, or for files older than 0.1.0: a warning and "
        "random weights, as Transformers passes over formats that it does not know",
    ),
    "model cards, push_to_hub": Tool("huggingface_hub", ("test_card",)),
    "PEFT": Tool(
        "peft",
        ("test_integration_peft", "test_peft_twins"),
        not_done='`merge_and_unload`: a sum with an adapter is not block low-rank (`merge="refit"` fits it anew); '
        "adapters on experts",
    ),
    "TRL": Tool("trl", ("test_trl",), not_done="a teacher under losses that make no logits, the only ones of TRL 1.16"),
    "torchrun, accelerate, FSDP2": Tool(
        "accelerate",
        ("test_distributed", "test_distributed_compress"),
        not_done="`tp_plan`: it splits a factor as if it were a dense weight",
    ),
    "lm-eval": Tool("lm_eval", ("test_tasks",)),
    "sentence-transformers": Tool("sentence-transformers", ("test_sentences", "test_examples"), "sentence"),
    "diffusers": Tool("diffusers", ("test_diffusers",)),
    "torch.export": Tool("torch", ("test_export", "test_linears"), "not onnx"),
    "ONNX": Tool("onnxruntime", ("test_linears",), "onnx"),
    "vLLM, on the CPU": Tool(
        "vllm",
        ("test_vllm", "test_vllm_shards"),
        not_done="its server and its kernels, which need a GPU, were not run; factors of experts are refused",
    ),
    "GGUF": Tool(
        "gguf",
        ("test_integration_gguf",),
        not_done="writing: llama.cpp builds each architecture from one matrix a projection",
    ),
    "compressed-tensors": Tool("compressed-tensors", ("test_format_compressed_tensors",)),
}


def row(name: str) -> dict[str, object] | None:
    """What the tests of one tool say; None where it is not installed."""
    tool = TOOLS[name]
    try:
        found = version(tool.package)
    except PackageNotFoundError:
        return None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(ROOT / "tests" / f"{test}.py") for test in tool.tests]
        command = [sys.executable, "-m", "pytest", "-q", *files, "-k", tool.words, f"--junit-xml={report}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        outcomes = Counter(next((child.tag for child in case if child.tag in WORSE), "passed") for case in cases)
    return {
        "tool": name,
        "package": tool.package,
        "version": found,
        "passed": outcomes["passed"],
        "failed": outcomes["failure"] + outcomes["error"],
        "skipped": outcomes["skipped"],
        "seconds": time.perf_counter() - started,
    }


#: how pytest marks what did not pass
WORSE = ("failure", "error", "skipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TOOLS), help="tools; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "tools.json")
    args = parser.parse_args()
    known = {each["tool"]: each for each in rows_of(json.loads(args.out.read_text()))} if args.out.exists() else {}
    where = environment()
    for name in args.names:
        found = row(name)
        if found is None:
            print(f"{name}: not installed")
            continue
        known[name] = found | {"commit": where["commit"]}
        print(known[name], flush=True)
        rows = [known[each] for each in TOOLS if each in known]
        args.out.write_text(json.dumps({"rows": rows, "environment": where}, indent=1) + "\n")


if __name__ == "__main__":
    main()
