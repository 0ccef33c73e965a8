"""run another program with hf_blr imported, so that it can load compressed models

Programs that know nothing of hf_blr cannot load its checkpoints; with the import they can.

Example: hf-blr run lm_eval --model hf --model_args pretrained=out --tasks arc_easy
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("module", metavar="MODULE", help="a Python module, as after python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec(args.module.partition(".")[0]) is None:
        raise ModuleNotFoundError(f"{args.module} is no Python module of this environment: install its package here")
    sys.argv = [args.module, *args.arguments]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)
