"""The command line in processes that are killed, and on disks that are full."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tiny import tiny_llama, tiny_tokenizer

OPTIONS = ["--structure", "low_rank", "--ratio", "0.6", "--num-samples", "4", "--seqlen", "64", "--dataset", "builtin"]
#: seconds instead of a fraction of one
SLOW = ["--structure", "blast", "--rounds", "300", "--tolerance", "0", "--block-steps", "20"]
#: the longest that a process runs before it is killed, in seconds
LONGEST = 6
#: of the disk that becomes full, and what is left free on it, in bytes
DISK, LEFT = "16m", 100_000


def kills(times: int, folder: Path) -> dict:
    """So many kills at random moments once there is a journal; after each the same command goes on.

    A run that comes to its end before its kill is begun anew, so there may be several complete ones.
    """
    straight, out, journal, draw = folder / "straight", folder / "out", folder / "journal", random.Random(0)
    write_dense(folder)
    subprocess.run(command(folder, straight, *SLOW), check=True, capture_output=True)
    run = command(folder, out, *SLOW, "--resume", str(journal), "--overwrite")
    done, complete, wrong = 0, 0, 0
    while done < times or journal.exists():
        with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not journal.exists():
                time.sleep(0.01)
            try:
                failed = process.wait(draw.uniform(0, LONGEST) if done < times else None)
                complete += 1
                wrong += bool(failed) or not same_files(straight, out)
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
    return {"tried": done, "wrong": wrong, "complete": complete}


def full_disks(times: int, folder: Path) -> dict:
    """A disk that becomes full under the new model, the journal, and statistics that memory has no room for.

    Room is made then, and the same command must end as one on a disk with room. Needs the right to mount.
    """
    write_dense(folder)
    subprocess.run(command(folder, folder / "straight"), check=True, capture_output=True)
    wrong = 0
    for number, options in enumerate(places(folder)[:times]):
        with disk(folder / "disk") as mounted:
            out = mounted / "out" if number == 0 else folder / f"out-{number}"
            subprocess.run(command(folder, out, "--ratio", "0.5"), check=True, capture_output=True)
            before = contents(out)
            filler, free = mounted / "filler", os.statvfs(mounted)
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize - LEFT))
            run = command(folder, out, "--overwrite", *options)
            failed = subprocess.run(run, capture_output=True, text=True)
            last = (failed.stderr.strip().splitlines() or [""])[-1]
            clear = failed.returncode == 2 and "Traceback" not in failed.stderr
            clear &= "No space left" in last or "is the disk full?" in last
            kept = contents(out) == before
            filler.unlink()
            again = subprocess.run(run, capture_output=True)
            right = again.returncode == 0 and same_files(folder / "straight", out)
            if not (clear and kept and right):
                print(f"disk {number}: clear {clear}, kept {kept}, right {right}: {failed.stderr[-500:]}", flush=True)
                wrong += 1
    return {"tried": min(times, len(places(folder))), "wrong": wrong}


def places(folder: Path) -> list[list[str]]:
    """What else lies on the disk besides the first time the model itself."""
    mounted = folder / "disk"
    files = ["--max-memory", "1KB", "--offload-folder", str(mounted / "files")]
    return [[], ["--resume", str(mounted / "journal")], files]


def write_dense(folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hf_blr", "compress", str(folder / "dense"), str(out), *OPTIONS, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_files(one: Path, other: Path) -> bool:
    name = "model.safetensors"
    return (other / name).exists() and (one / name).read_bytes() == (other / name).read_bytes()


@contextmanager
def disk(folder: Path):
    """A small disk in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
