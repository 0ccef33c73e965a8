"""What `bench layers` and `bench model` share: options, and the head of a result file."""

from __future__ import annotations

import argparse
from typing import Any

from hf_blr.bench.environment import environment
from hf_blr.cli import options


def add_common(parser: argparse.ArgumentParser) -> None:
    options.add_device(parser)
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of weights and inputs")
    parser.add_argument("--append", action="store_true", help="keep the rows that the --json file holds already")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    options.add_json(parser)


def head(args: argparse.Namespace, protocol: str) -> dict[str, Any]:
    """What stands above the rows of a result file."""
    where = environment() | ({"commit": args.commit} if args.commit else {})
    return {"environment": where, "dtype": args.dtype, "protocol": protocol}
