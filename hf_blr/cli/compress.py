"""replace a model's layers by block low-rank ones and save the result

Examples:
  hf-blr compress HuggingFaceTB/SmolLM2-135M out --structure blast --ratio 0.7 --dataset wikitext2
  hf-blr compress meta-llama/Llama-3.1-8B out --ratio 0.7 --resume journal   (the same again after it was stopped)
  hf-blr compress --status journal
  torchrun --nproc-per-node 2 -m hf_blr compress meta-llama/Llama-3.1-8B out --ratio 0.7   (on two GPUs)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_blr.cli import loading, options, saving
from hf_blr.cli.plan import read_plan
from hf_blr.folders import replacing_folder
from hf_blr.markdown import format_table
from hf_blr.plan.rows import by_kind, rows_by_kind

if TYPE_CHECKING:
    from hf_blr.compression.report import LayerReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser)
    size = options.add_blr(parser)
    # a structure that keeps the whole matrix has no size; of any other, the config asks for one
    size.required = False
    size.add_argument(
        "--plan", type=Path, metavar="FILE", help="a plan that `hf-blr plan` wrote: layers, ranks and all"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="keep what is finished in FOLDER, and go on from what it holds if the same command was stopped, even "
        "killed; the result is the same to the last bit. Once OUT is written, FOLDER is removed",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory for statistics and hidden states of the text, such as 6GB, beside the model and the block at "
        "work; the rest goes to --offload-folder, which takes longer, and the result is the same",
    )
    parser.add_argument(
        "--offload-folder",
        type=Path,
        metavar="FOLDER",
        help="for what --max-memory leaves no room for; if left out, where temporary files are",
    )
    parser.add_argument(
        "--offload-weights",
        action="store_true",
        help="leave the dense weights in the checkpoint's files, and read each as its turn comes, on the CPU. Name a "
        "--dataset that is read: a model writes text of its own very slowly so",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="size of a file of OUT: finished layers are written, and leave memory, when they take so much",
    )
    parser.add_argument(
        "--status",
        action=Status,
        type=Path,
        metavar="FOLDER",
        help="say how far the compression in FOLDER is, and exit",
    )
    options.add_json(parser)


class Status(argparse.Action):
    """Prints the status of a journal and exits, whatever else is missing on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from hf_blr.compression.journal import status_of

        assert isinstance(values, Path)
        try:
            print(status_of(values))
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        parser.exit()


def run(args: argparse.Namespace) -> None:
    from hf_blr.checkpoint.origin import public_command, record_origin
    from hf_blr.checkpoint.record import holders
    from hf_blr.compression import Journal, Shards, compress

    processes = options.launched(args)
    if not processes.rank:
        # which tries to write there, as one process at a time can
        saving.check_output(args.output, args.overwrite)
    config = options.blr_config(args, layers=None if args.plan is None else read_plan(args.plan))
    if args.offload_weights and args.device != "cpu":
        raise ValueError(f"--offload-weights reads them on the CPU: pass --device cpu, got --device {args.device}")
    journal = None if args.resume is None else Journal(args.resume)
    textless = config.dataset is None
    model, reader = loading.load_model(args.model, args, on_disk=args.offload_weights, textless=textless)
    text = loading.fitted_to(args, reader)
    more = {"max_memory": args.max_memory, "offload_folder": args.offload_folder, "distributed": processes.count > 1}
    if processes.rank:
        # the first process writes
        compress(model, config, resume=journal, progress=False, **text, **more)
        return
    # what took hours is kept until it is saved
    with journal or nullcontext(), replacing_folder(args.output) as new:
        shards = Shards(new, args.max_shard_size)
        report = compress(model, config, resume=journal, shards=shards, **text, **more)
        record_origin(holders(model), command=public_command(args.words))
        print(format_table(layer_rows(report.layers)))
        print(report)
        saving.save(model, reader, args.output, shards)
        saving.write_json(args.json, {"model": args.model, "config": config.to_dict(), "report": report.to_dict()})


def layer_rows(layers: list[LayerReport]) -> list[dict[str, Any]]:
    """One row for each kind of layer: what it became, mean and worst error, seconds."""
    specs = {layer.name: layer.spec for layer in layers}
    reports = {layer.name: layer for layer in layers}
    rows = []
    for row, names in zip(rows_by_kind(specs), by_kind(specs).values(), strict=True):
        errors = [reports[name].rel_error for name in names]
        fit = {"mean error": sum(errors) / len(errors), "worst error": max(errors)}
        rows.append({**row, **fit, "seconds": sum(reports[name].seconds for name in names)})
    return rows
