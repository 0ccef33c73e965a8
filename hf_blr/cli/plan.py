"""choose structure, blocks and rank for each layer under a budget, and write the plan

The plan is a JSON file to look at and to edit: layers taken out of it stay dense. `hf-blr compress --plan
FILE` follows it.

Examples:
  hf-blr plan HuggingFaceTB/SmolLM2-135M plan.json --ratio 0.6 --structure auto
  hf-blr plan HuggingFaceTB/SmolLM2-135M plan.json --structure auto --bits-per-weight 3.5 --group-size 64
  hf-blr plan meta-llama/Llama-3.2-1B plan.json --structure auto --stored-mb 400 --group-size 64
  hf-blr plan meta-llama/Llama-3.2-1B plan.json --ms 9 --device-name H100 --tokens 1024
  hf-blr plan meta-llama/Llama-3.2-1B plan.json --structure auto --bits-per-weight 4 --ms 0.5 --tokens 1
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_blr.atomic import write_text_atomically
from hf_blr.cli import loading, options, saving
from hf_blr.markdown import format_table
from hf_blr.plan.rows import rows_by_kind

if TYPE_CHECKING:
    from torch import nn

    from hf_blr.calibration.fisher import Statistics
    from hf_blr.compression.budget import Budget
    from hf_blr.formats import Format
    from hf_blr.plan import Plan
    from hf_blr.structures import BLRSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("output", metavar="FILE", type=Path, help="where to write the plan")
    parser.add_argument("--overwrite", action="store_true", help="write over a FILE that exists")
    size = options.add_blr(parser)
    # --ms may stand alone, or beside one of them
    size.required = False
    size.add_argument("--parameters", type=float, help="what the replaced layers may keep together, in millions")
    size.add_argument("--mb", type=float, help="their bytes in MB, at the dtype of the loaded weights")
    size.add_argument(
        "--stored-mb", type=float, help="with --structure auto, what they may store in MB, in whatever formats"
    )
    parser.add_argument(
        "--ms",
        type=float,
        help="their time together in a forward, predicted from the roofline; alone or beside a budget of bits",
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the forward that --ms speaks of")
    parser.add_argument("--device-name", default="H100", help="the device that --ms speaks of, as in hf-blr roofline")
    parser.add_argument("--floor", type=float, default=0.1, help="smallest ratio that a replaced layer may keep")
    parser.add_argument("--ceiling", type=float, default=1.0, help="largest ratio of a layer that is not left dense")


def run(args: argparse.Namespace) -> None:
    from hf_blr.calibration import collect_statistics
    from hf_blr.compression.bits import TimeLimit, share_bits
    from hf_blr.compression.budget import share_budget
    from hf_blr.compression.turning import turn_stream
    from hf_blr.plan import layers_from_plan, resolve_plan

    saving.check_file(args.output, args.overwrite)
    if not args.fisher or args.dataset == "none" or args.rank is not None or args.allocation == "uniform":
        raise ValueError("a plan is chosen by what the loss feels on text: leave --rank, --no-fisher, --allocation out")
    given = [args.ratio, args.parameters, args.mb]
    if args.stored_mb is not None:
        # checked like any other; how many bits a weight it is, the plan will say
        args.bits_per_weight = 16.0
    if args.ms is None and args.bits_per_weight is None and given == [None] * 3:
        raise ValueError(
            "a plan needs a budget: give --ratio, --parameters, --mb, --stored-mb, --ms or --bits-per-weight"
        )
    if args.ms is not None and given != [None] * 3:
        raise ValueError(
            "--ms stands alone or beside --bits-per-weight or --stored-mb: leave --ratio, --parameters and --mb out"
        )
    # short fits compare structures at this size where the budget names none
    args.ratio = 0.5 if args.ratio is None and args.bits_per_weight is None else args.ratio
    config = options.blr_config(args, turned=False)
    model, reader = loading.load_model(args.model, args)
    if args.turned:
        turn_stream(model, config.seed)
    statistics = collect_statistics(model, config, **loading.fitted_to(args, reader))
    plan = resolve_plan(model, config)
    if args.stored_mb is not None:
        config.bits_per_weight = 8e6 * args.stored_mb / dense_parameters(plan)
    if config.bits_per_weight is not None:
        time = None if args.ms is None else TimeLimit(args.ms / 1e3, seconds_of(args, plan, statistics))
        chosen, loss, choices = share_bits(model, plan, statistics, config, time)
        print("; ".join(f"{count} x {taken}" for taken, count in Counter(c.taken for c in choices.values()).items()))
    else:
        chosen, loss = share_budget(model, plan, statistics, config, budget_of(args, model, plan, statistics))
    specs = {name: layer.spec for name, layer in chosen.items()}
    print(format_table(rows_by_kind(specs, {name: layer.matrices for name, layer in chosen.items()})))
    dense = sum(layer.matrices * layer.spec.dense_parameters for name, layer in plan.items() if name not in chosen)
    kept = dense + sum(layer.matrices * layer.spec.num_parameters for layer in chosen.values())
    total = dense_parameters(plan)
    left = [name for name in plan if name not in chosen]
    print(
        f"{len(chosen)} layers to replace, {len(left)} left dense{': ' if left else ''}{', '.join(left)}; together "
        f"{kept / 1e6:.1f} M of {total / 1e6:.1f} M parameters ({100 * kept / total:.1f} %). Predicted rise of "
        f"the loss if fitted one-shot: {loss:.4f} nats a token; sequential fits do better"
    )
    result = {"model": args.model, "predicted_loss": loss, "layers": layers_from_plan(chosen)}
    write_text_atomically(args.output, json.dumps(result, indent=1) + "\n")
    follow = f"hf-blr compress {args.model} OUT --plan {args.output}{' --turned' if args.turned else ''}"
    print(f"plan written to {args.output}; edit it, then: {follow}")


def dense_parameters(plan: Plan) -> int:
    return sum(layer.matrices * layer.spec.dense_parameters for layer in plan.values())


def budget_of(args: argparse.Namespace, model: nn.Module, plan: Plan, statistics: Statistics) -> Budget:
    """The Budget that the options name."""
    from hf_blr.compression.budget import Budget
    from hf_blr.formats import PLAIN

    limits = {"floor": args.floor, "ceiling": args.ceiling}
    if args.parameters is not None:
        return Budget(args.parameters * 1e6, **limits)
    if args.mb is not None:
        return Budget(args.mb * 1e6 / next(model.parameters()).element_size(), **limits)
    if args.ms is None:
        return Budget(**limits)
    seconds = seconds_of(args, plan, statistics)
    return Budget(args.ms / 1e3, cost=lambda name, spec, dense: seconds(name, spec, PLAIN, dense), **limits)


def seconds_of(
    args: argparse.Namespace, plan: Plan, statistics: Statistics
) -> Callable[[str, BLRSpec, Format, bool], float]:
    """(name, spec, format, whether it is the dense layer as it was) -> predicted seconds of a layer's forward."""
    from hf_blr.roofline.devices import DEVICES
    from hf_blr.roofline.experts import predict_experts
    from hf_blr.roofline.stages import predict, predict_stored

    if args.device_name not in DEVICES:
        raise ValueError(f"--device-name must be one of {sorted(DEVICES)}, got {args.device_name!r}")
    device = DEVICES[args.device_name]

    def seconds(name: str, spec: BLRSpec, storage: Format, dense: bool) -> float:
        if experts := plan[name].experts:
            # as many experts a token as in the text
            pairs = args.tokens * statistics.rows_of(name) / statistics.tokens
            return predict_experts(spec, storage, pairs, experts, device, dense)
        if dense:
            return predict(spec, args.tokens, device, form="dense")
        return predict_stored(spec, storage, args.tokens, device)

    return seconds


def read_plan(path: Path) -> dict[str, dict]:
    """The layers of a plan file. Raises ValueError if it is none."""
    try:
        layers = json.loads(path.read_text())["layers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no plan that `hf-blr plan` wrote: {error!r}") from None
    if not layers:
        raise ValueError(f"{path} holds no layers, so there is nothing to compress")
    return layers
