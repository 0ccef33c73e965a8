"""What a second GPU brings to compression, training and inference: random weights and text.

    python benchmarks/several_gpus.py --model Llama-3-8B --blocks 8 --sequences 64

Each number is measured in processes of its own under torchrun, one a GPU. Compression: the whole call of `compress`,
low-rank at 0.7, of a model in memory, behind a small one that loads the libraries, by one process and by two; compared
are their predictions on other tokens, beside what separates both from the dense model. Training: all factors by fused
AdamW, in bfloat16, as many tokens on each GPU, steps behind a warm-up. FSDP2's shards are gathered, saved, read back
by `from_pretrained`. Placement: logits of a checkpoint whose blocks lie on two GPUs, and on one, both after `fuse`.
Tensor parallelism: the MLP of one block, whole, and with half of its inner features as each of two GPUs would hold it,
beside the sum over both GPUs that the halves need; medians of CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from hf_blr.bench.environment import environment
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile

RESULTS = Path(__file__).parent / "results"
STEPS = Path(__file__).with_name("several_gpus_steps.py")
#: what a step says before its numbers
MARK = "measured: "
#: (step, numbers of processes)
RUNS = (
    ("compress", (1, 2)),
    ("ddp", (1, 2)),
    ("fsdp2", (1, 2)),
    ("placement", (1,)),
    ("tensor_parallel", (2,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--only", nargs="+", choices=[name for name, _ in RUNS], default=[name for name, _ in RUNS])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="only those of so many")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--out", type=Path, default=RESULTS / "several_gpus.json")
    args = parser.parse_args()
    machine = environment()
    head = {"protocol": " ".join(__doc__.split("\n\n")[2].split())}
    head["environment"] = {**machine, "commit": args.commit or machine["commit"]}
    result = ResultFile(args.out, head, append=True)
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        for name, counts in RUNS:
            for count in counts:
                if name in args.only and count in args.processes:
                    result.add([measured(args, name, count, str(folder))])
                    print(result.rows[-1], flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the steps too."""
    parser.add_argument("--model", default="Llama-3-8B", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=64, help="of the text to compress with")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a training step on each GPU")
    parser.add_argument("--sizes", type=json.loads, default={}, help="other sizes of the model's config, for a dry run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--folder", type=Path, help="where files are left; else they are temporary")


def measured(args: argparse.Namespace, name: str, count: int, folder: str) -> dict:
    """The row of one step by so many processes; with the reason where it fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(STEPS)]
    passed = ("model", "blocks", "sequences", "length", "batch", "device")
    options = [part for key in passed for part in (f"--{key}", str(getattr(args, key)))]
    options += ["--sizes", json.dumps(args.sizes), "--folder", folder, "--step", name]
    done = subprocess.run([*launch, *options], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    row = {"measured": name, "processes": count, "model": args.model, "blocks": args.blocks, "sizes": args.sizes}
    row["device"] = args.device
    if not lines:
        # torchrun says much more behind what went wrong
        said = [line for line in done.stderr.splitlines() if line.startswith("[rank0]:")] or [done.stderr[-2000:]]
        return {**row, "failed": said[-1]}
    return {**row, **json.loads(lines[-1].removeprefix(MARK))}


if __name__ == "__main__":
    main()
