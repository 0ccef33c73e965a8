"""The fields of a `BLRConfig`: default, help text, check, and place on the command line of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_blr.config import options
from hf_blr.config.names import ALLOCATIONS, FORMAT_VERSION
from hf_blr.config.options import integer, option
from hf_blr.config.texts import DEFAULT

#: the groups of `--help`
BECOMES, FITTED = "what the layers become", "how they are fitted"


@dataclass(eq=False, repr=False)
class BLRSettings:
    """What a user sets, in the order of the constructor."""

    structure: str = option(
        "blast",
        'What replaces the layers: a structure\'s name; "dense", which keeps the whole matrix in `dense_format`; or '
        '"auto", which takes for each layer the structure, blocks and rank of the least predicted loss (it needs text, '
        "`fisher`, and a ratio or `bits_per_weight`).",
        options.anything,
        flag="--structure",
        group=BECOMES,
        cli_help="what replaces the layers: a structure; dense keeps whole matrices, in --dense-format; auto takes for "
        "each layer the structure, blocks and rank of the least predicted loss, under --ratio or --bits-per-weight",
    )
    ratio: float | None = option(
        None,
        "Kept / dense parameters of the replaced matrices, 0 to 1: of all of them together, or of each with a uniform "
        "allocation. Give this, a rank, or `layers`.",
        options.ratio,
        flag="--ratio",
        group=BECOMES,
        cli_help="kept / dense parameters of the replaced layers, 0 to 1: of all of them together, or of each with "
        "--allocation uniform",
        type=float,
        size=True,
    )
    rank: int | None = option(
        None,
        "The rank of each replaced matrix; for Monarch, of each block pair.",
        integer(1, optional=True),
        flag="--rank",
        group=BECOMES,
        cli_help="the rank of each replaced layer; for Monarch, of each block pair",
        type=int,
        size=True,
    )
    num_blocks: int | tuple[int, int] | None = option(
        None,
        "(input blocks, output blocks) of BLAST and Monarch, or one number for both; if left out, (4, 16) for BLAST "
        "and (4, 4) for Monarch.",
        options.anything,
        flag="--num-blocks",
        cli_help="input and output blocks of BLAST and Monarch; 4x16 and 4x4 if left out",
        group=BECOMES,
        metavar="B or B1xB2",
    )
    target_modules: str | list[str] | None = option(
        None,
        "Which layers, in PEFT's vocabulary: a list of names or name endings, or a regular expression that the whole "
        'name must match. If left out, or "all-linear": every attention and MLP projection inside the repeated '
        "blocks; never the head, embeddings, routers or tied weights.",
        options.names_or_pattern,
        flag="--target-modules",
        group=BECOMES,
        cli_help="names or endings of names of the layers to replace, or one regular expression; if left out, every "
        "attention and MLP projection, and never the head, embeddings, routers or tied weights",
        nargs="+",
        metavar="NAME",
    )
    modules_to_not_convert: str | list[str] | None = option(
        None,
        "Names or endings (or one regular expression) of layers to leave dense.",
        options.names_or_pattern,
        flag="--keep-dense",
        group=BECOMES,
        cli_help="names or endings of names of layers to leave dense, or one regular expression",
        nargs="+",
        metavar="NAME",
    )
    overrides: dict[str, dict[str, Any]] | None = option(
        None,
        '{pattern: {"structure" | "ratio" | "rank" | "num_blocks" | "factor_format" | "dense_format" | "group_size": '
        "...}}; a pattern is a regular expression that an ending of the module's name must match; the first that does "
        "is used.",
        options.dict_of_dicts,
    )
    dataset: Any = option(
        None,
        'Text to fit to: "self" (the dense model writes it), "self:chat" (conversations), "builtin" (Python\'s own '
        'documentation), "wikitext2", "c4", a text file or a folder of them, a .jsonl, .csv or .parquet file or a hub '
        'id owner/name, each with an optional ":column", a .safetensors file that `hf-blr write` wrote, a mixture '
        "{source: share} (on the command line self=0.5,wikitext2=0.5), a list of strings, or a `datasets.Dataset`. "
        '"default" is the text that the command line takes where none is named. None fits the weights alone.',
        options.anything,
        flag="--dataset",
        group=FITTED,
        cli_help="text to fit to: self (the dense model writes it), self:chat (conversations), builtin (Python's own "
        "documentation), wikitext2, c4, a text file or a folder of them, a .jsonl, .csv or .parquet file or a hub id "
        "owner/name, each with an optional :column, a .safetensors file that `hf-blr write` wrote, or a mixture such "
        "as self=0.5,wikitext2=0.5; none fits the weights alone; default is self, builtin for a model that cannot "
        "write, and none for one that does not run on text alone",
        cli_default=DEFAULT,
        none="none",
    )
    sequential: bool = option(
        True,
        "Fit each layer on the inputs that the layers compressed before it give it, towards the dense model's outputs, "
        "instead of on the dense model's inputs. Needs a model that is a chain of blocks.",
        options.boolean,
        flag="--one-shot",
        group=FITTED,
        cli_help="fit each layer to the dense model's activations, not to those of the layers compressed before it: "
        "faster",
    )
    fisher: bool = option(
        True,
        "Weigh errors in a layer's outputs by how much the model's loss feels them; costs one backward pass over the "
        "calibration data. A model without logits of several classes is weighed by the squared error of its features.",
        options.boolean,
        flag="--no-fisher",
        group=FITTED,
        cli_help="weigh all outputs of a layer alike: saves a backward pass over the calibration text",
    )
    allocation: str | None = option(
        None,
        '"loss" shares the ratio out over the layers so that the predicted loss is least, and may leave some dense; '
        '"uniform" gives each its own ratio. If left out: "loss" where `fisher` weighs a calibrated fit of a ratio.',
        options.one_of(None, *ALLOCATIONS),
        flag="--allocation",
        group=FITTED,
        cli_help="loss shares --ratio out over the layers so that the predicted loss is least, and may leave some "
        "dense (if left out, wherever there is text); uniform gives each layer that ratio",
        choices=ALLOCATIONS,
    )
    passes: int = option(
        1,
        "Times that the whole model is fitted. From the second on, what weighs the layers and shares the budget out is "
        "gathered on the model that the pass before left. Needs text and `fisher`, and memory for a copy of the model.",
        integer(1),
        flag="--passes",
        group=FITTED,
        type=int,
    )
    block_steps: int = option(
        0,
        "Gradient steps that refine all factors of a block together once its layers are fitted; 0 for none. Needs "
        "text, and `sequential`.",
        integer(0),
        flag="--block-steps",
        group=FITTED,
        cli_help="gradient steps that refine all factors of a block together once its layers are fitted; 0 for none",
        type=int,
    )
    num_samples: int = option(128, "Windows of text at most.", integer(1), flag="--num-samples", group=FITTED, type=int)
    seqlen: int = option(2048, "Tokens in a window of text.", integer(2), flag="--seqlen", group=FITTED, type=int)
    fit_rounds: int = option(
        16,
        "Rounds of alternating least squares (BLAST) or block descent (Monarch) at most.",
        integer(1),
        flag="--rounds",
        group=FITTED,
        type=int,
    )
    fit_tolerance: float = option(
        3e-3,
        "Stop when a round lowers the squared error by less than this fraction.",
        options.fraction,
        flag="--tolerance",
        group=FITTED,
        type=float,
    )
    damping: float | None = option(
        None,
        "Added to the diagonal of each input Gram matrix, as a fraction of its mean. If left out, sqrt(K / T) for K "
        "features and T tokens: the less text, the less is believed of it.",
        options.optional_fraction,
        flag="--damping",
        group=FITTED,
        type=float,
    )
    fit_device: str | None = option(
        None,
        'Where the fits run; if left out, on the weight\'s device, or on "cuda" if there is one and that is the CPU.',
        options.text,
        flag="--fit-device",
        group=FITTED,
        metavar="DEVICE",
    )
    seed: int = option(
        0,
        "Of the calibration windows, of the fits' starting points, and of rotations before rounding.",
        integer(),
        flag="--seed",
        group=FITTED,
        type=int,
    )
    layers: dict[str, dict[str, Any]] | None = option(
        None,
        "The resolved plan, {module: spec}; filled in by the compression and read back from a checkpoint. With a plan "
        "neither ratio nor rank is needed.",
        options.dict_of_dicts,
    )
    origin: dict[str, Any] | None = option(
        None,
        "What the model came from and what was measured on it, for its model card; filled in by the compression.",
        options.facts,
    )
    version: int = option(FORMAT_VERSION, "Of this format.", integer(1))
    # transformers looks it up among names of its own and of plugins; its annotation knows its own alone
