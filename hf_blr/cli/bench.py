"""measure speed: `bench layers` one layer at a time, `bench model` whole models

Both use random weights, print rows as they come, and with --json write them after every row.

Example: hf-blr bench layers --models Llama-7B --tokens 1 1024 --json layers.json
"""

from __future__ import annotations

import argparse

from hf_blr.cli.bench_layers import add_layers_arguments, bench_layers
from hf_blr.cli.bench_models import add_model_arguments, bench_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="layers | model")
    layers_parser = what.add_parser("layers", help="one layer", formatter_class=parser.formatter_class)
    add_layers_arguments(layers_parser)
    layers_parser.set_defaults(bench=bench_layers)
    model_parser = what.add_parser("model", help="whole models", formatter_class=parser.formatter_class)
    add_model_arguments(model_parser)
    model_parser.set_defaults(bench=bench_model)


def run(args: argparse.Namespace) -> None:
    args.bench(args)
