"""write the model card of a compressed model into its folder

Text that is in the README.md already stays; the section of hf_blr is written anew. What `hf-blr evaluate --json` has
measured becomes a table in it.

Example: hf-blr card out --results scores.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_blr.cli import loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", type=Path, help="holds a compressed model")
    parser.add_argument("--name", help="by which others will load it, such as a hub id; the folder's if left out")
    parser.add_argument("--results", metavar="FILE", type=Path, help="written by `hf-blr evaluate --json`")


def run(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from hf_blr.checkpoint.card import CARD, write_card

    config = AutoConfig.from_pretrained(args.model)
    loading.stored_config(args.model, config)
    write_card(args.model, config, args.name, None if args.results is None else score_rows(args.results))
    print(f"card written to {args.model / CARD}")


def score_rows(file: Path) -> list[dict[str, Any]]:
    """A table's rows of what `hf-blr evaluate` measured. Raises ValueError if the file is none of its."""
    from hf_blr.checkpoint.origin import public_name, score_row

    try:
        results = json.loads(file.read_text(encoding="utf-8"))["rows"]
        if "scores" not in results[0]:
            return [score_row(public_name(row["model"]), row) for row in results]
        return [
            {"model": public_name(row["model"]), "task": task, **scores}
            for row in results
            for task, scores in row["scores"].items()
        ]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is no file that `hf-blr evaluate --json` wrote: {error!r}") from None
