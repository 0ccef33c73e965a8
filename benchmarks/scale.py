"""Seconds and peak memory of a whole run (load, compress, save) against the size of the model; random weights and text.

    python benchmarks/scale.py --model Llama-3.2-1B --blocks 2 4 --sequences 4 --length 256

Each run is a process of its own, so that its peaks are its own: the largest resident set; the most of it that the
system cannot take back, which leaves out the pages of mapped files; and the most that PyTorch held on the GPU. Writing
the random checkpoint is another process, and no part of the time. With `--kill` a run with a journal is killed when
half of its layers are finished, and the same command goes on; its files are compared with those of the run that nobody
killed. Time and memory depend on how much text there is and not on which. A run that gets SIGTERM says what it has
taken by then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int

from hf_blr import BLRConfig, compress
from hf_blr.bench.environment import environment
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile
from hf_blr.calibration.host import host_memory
from hf_blr.structures import block_pair_of

RESULTS = Path(__file__).parent / "results"
#: of tokens that go through the model at once, as of a config's own text
TOKENS_PER_FORWARD = 16384
#: bytes of a unit of `ru_maxrss`
KIB = 1024
#: seconds between two looks at what a process holds
INTERVAL = 0.02
#: what a run says before its numbers
MARK = "measured: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3.2-1B", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, nargs="*", help="of the model, a run for each number; all if left out")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument(
        "--structure", nargs="+", default=["low_rank"], help="a run for each; with blocks as in blast:4x16"
    )
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--max-memory", help="as of `hf-blr compress`")
    parser.add_argument("--offload-weights", action="store_true", help="as of `hf-blr compress`")
    parser.add_argument("--gpu-memory", help='such as "24GB": PyTorch gets no more of the GPU')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where checkpoints go meanwhile; else where temporary files do")
    parser.add_argument("--kill", action="store_true", help="also kill a run, go on with it, and compare")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--step", choices=["write", "run", "resume"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        write(args) if args.step == "write" else run(args)
        return
    machine = environment()
    head = {"protocol": " ".join(__doc__.split("\n\n")[2].split())}
    head["environment"] = {**machine, "commit": args.commit or machine["commit"]}
    result = ResultFile(args.out, head, append=True)
    for blocks in args.blocks or [whole_blocks(args.model)]:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            step(["--blocks", str(blocks), "--folder", folder, "--step", "write"])
            for structure in args.structure:
                result.add([measured(args, blocks, structure, Path(folder))])
                print(result.rows[-1], flush=True)
                if "stopped_in" in result.rows[-1]:
                    return


def measured(args: argparse.Namespace, blocks: int, structure: str, folder: Path) -> dict:
    """The row of one size and structure, of the checkpoint that lies in the folder."""
    own = ["--blocks", str(blocks), "--structure", structure, "--folder", str(folder)]
    row = {
        "model": args.model,
        "blocks": blocks,
        "of_blocks": whole_blocks(args.model),
        "structure": structure,
        "ratio": args.ratio,
        "tokens": args.sequences * args.length,
        "max_memory": args.max_memory,
        "offload_weights": args.offload_weights,
        "gpu_memory": args.gpu_memory,
        "device": args.device,
        **step([*own, "--step", "run"]),
    }
    if args.kill and "stopped_in" not in row:
        straight = digest(folder / "out")
        resumed = [*own, "--step", "resume"]
        seconds = killed(resumed, folder / "journal", row["layers"] // 2)
        again = step(resumed)
        row |= {"killed_after": seconds, "seconds_after_kill": sum(again[part] for part in PARTS)}
        row["same_bits"] = digest(folder / "out") == straight
    return row


#: of a run, in order
PARTS = ("load_seconds", "compress_seconds", "save_seconds")


def step(options: list[str]) -> dict:
    """Runs this file once more, with the command line and these options; returns what it measured."""
    with subprocess.Popen([*this_command(), *options], stdout=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        said, _ = process.communicate()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else {}


def this_command() -> list[str]:
    return [sys.executable, *sys.argv]


def killed(options: list[str], journal: Path, layers: int) -> float:
    """Seconds after which a run was killed, as so many of its layers were in the journal."""
    started = time.perf_counter()
    with subprocess.Popen([*this_command(), *options], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(journal.glob("layers/*.safetensors"))) < layers:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    return time.perf_counter() - started


def write(args: argparse.Namespace) -> None:
    """A random checkpoint in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = SHAPES[args.model].build(num_hidden_layers=args.blocks[0])
    model.save_pretrained(args.folder / "dense")


def run(args: argparse.Namespace) -> None:
    """Loads, compresses and saves, and prints what that took, or has taken when it is told to end."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if args.gpu_memory is not None:
        room = convert_file_size_to_int(args.gpu_memory) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(room)
    watch, clock, found = Anonymous(), [now()], {}

    def say(*signalled: object) -> None:
        # who signals a group of processes signals this one twice
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signalled:
            found["stopped_in"] = PARTS[len(clock) - 1]
            clock.append(time.perf_counter())
        found.update((part, end - begin) for part, begin, end in zip(PARTS, clock, clock[1:], strict=False))
        print(MARK + json.dumps(found | peaks(args.device, watch)), flush=True)
        if signalled:
            os._exit(0)

    signal.signal(signal.SIGTERM, say)
    place = {"": "disk" if args.offload_weights else args.device}
    model = AutoModelForCausalLM.from_pretrained(
        args.folder / "dense", dtype="auto", device_map=place, offload_folder=args.folder
    )
    clock.append(now())
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    batches = torch.randint(model.config.vocab_size, (args.sequences, args.length), device=args.device)
    report = compress(
        model,
        config_of(args.structure[0], args.ratio),
        calibration=list(batches.split(max(1, TOKENS_PER_FORWARD // args.length))),
        resume=args.folder / "journal" if args.step == "resume" else None,
        max_memory=args.max_memory,
        offload_folder=args.folder,
        progress=False,
    )
    clock.append(now())
    found |= {"layers": len(report.layers), "fit_seconds": sum(layer.seconds for layer in report.layers)}
    model.save_pretrained(args.folder / "out")
    clock.append(now())
    say()


def config_of(structure: str, ratio: float) -> BLRConfig:
    name, _, blocks = structure.partition(":")
    return BLRConfig(name, ratio=ratio, **({"num_blocks": block_pair_of(blocks)} if blocks else {}))


class Anonymous:
    """The most memory without a file behind it that this process has had since, on Linux; seen by looking often."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.peak = max(self.peak, held * KIB)
            time.sleep(INTERVAL)


def peaks(device: str, watch: Anonymous) -> dict[str, int | None]:
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
        "peak_anonymous_bytes": watch.peak,
        "ram_bytes": host_memory()[0],
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
    }


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def whole_blocks(model: str) -> int:
    with torch.device("meta"):
        return SHAPES[model].build().config.num_hidden_layers


def digest(folder: Path) -> str:
    """Of all weights in a folder's files."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


if __name__ == "__main__":
    main()
