"""Writes the text "own" of `quality.py`'s calibration sets: windows that the dense model samples itself, seeded.

    python benchmarks/own_text.py --model FOLDER --gguf-file NAME --windows 1152 --out own.pt --json own_text.json

With `--begin-with` the texts go on from pieces of named parts, in the place of an empty document:

    python benchmarks/own_text.py ... --parts valid=valid.txt code=code.txt --begin-with valid=0.5 code=0.5 --name begun

The torch file is a source for `quality.py --parts`; it holds the rounds that are done. The row says the seconds, and
which tokens came out. Another device may write other tokens, so those that the rows of `quality_h200.json` are fitted
to are kept: `results/own_text.pt`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import protocol
from calibration_sets import Mixture, drawn
from protocol import read_ids, sha256_of

from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile
from hf_blr.cli import loading, options
from hf_blr.text import write_windows

PROTOCOL = (
    "texts sampled at temperature 1 from an empty document each, or from a piece of a part that a row names, which is "
    "the text's beginning then, all of one length, those of a round together as far "
    "as half of the memory holds them; seconds from the loaded model to token ids on the CPU, with no run before"
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id of a causal language model")
    options.add_loading(parser)
    # half the keys and values; text needs no more
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--windows", type=int, default=1152)
    parser.add_argument("--texts", type=int, default=4, help="in a window, each begun with an empty document")
    parser.add_argument("--rounds", type=int, default=2, help="in which they are written, each with the next seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round that would end after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=[], metavar="PART", help="as of quality.py, to begin with")
    parser.add_argument("--begin-with", nargs="+", metavar="PART=SHARE", help="go on from pieces of these parts")
    parser.add_argument("--begin-tokens", type=int, default=32, help="in a piece")
    parser.add_argument("--name", default="own", help="of the part that is written")
    parser.add_argument("--out", type=Path, required=True, help="torch file to write")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, required=True, help="result file to write or to add to")
    args = parser.parse_args(argv)
    model, tokenizer = loading.load_model(args.model, args)
    machine = environment()
    commit = args.commit or machine["commit"]
    file = ResultFile(args.json, {"protocol": PROTOCOL, "environment": {**machine, "commit": commit}}, append=True)
    count, length = args.windows // args.rounds * args.texts, protocol.SEQLEN // args.texts
    pieces, begun = [None] * args.rounds, {}
    if args.begin_with:
        mixture = Mixture.parse(args.begin_with)
        parts = read_ids(args.parts, tokenizer)
        # all rounds together, so that a piece comes again only when all have come
        every = drawn(parts, mixture, args.seed, count * args.rounds, args.begin_tokens, again=True)[0]
        pieces = every.chunk(args.rounds)
        begun = {"begun_with": mixture.label, "begin_tokens": args.begin_tokens}
    started, seconds, rounds = time.perf_counter(), 0.0, []
    for number in range(args.rounds):
        if number and seconds + seconds / number > args.seconds:
            break
        written = write_windows(model, tokenizer, count, length, args.seed + number, beginnings=pieces[number])
        # rows that follow each other differ in their beginnings
        rounds.append(written.view(-1, protocol.SEQLEN).int())
        seconds = time.perf_counter() - started
        torch.save({args.name: torch.cat(rounds)}, args.out)
    windows = torch.cat(rounds)
    row = {
        "model": Path(args.gguf_file or args.model).name.partition(".Q")[0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "windows": len(windows),
        "seqlen": protocol.SEQLEN,
        "texts": args.texts,
        "rounds": len(rounds),
        "seed": args.seed,
        **begun,
        "seconds": seconds,
        "sha256": sha256_of(windows),
        "commit": commit,
    }
    if torch.cuda.is_available():
        row["peak_memory"] = torch.cuda.max_memory_allocated()
    file.add([row])
    print(f"{windows.numel()} tokens in {seconds:.0f} s, {windows.numel() / seconds:.0f} a second", flush=True)


if __name__ == "__main__":
    main()
