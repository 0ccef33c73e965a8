"""Sentence embeddings of a compressed encoder beside the dense one's: their mean cosine, on sentences of other texts.

    python benchmarks/sentences.py --model FOLDER --parts web=web.txt technical=technical.txt \
        --calibration web=0.5 technical=0.5 --sentences ptb=ptb.txt c4=c4.txt --json results/sentences.json

It is fitted to windows of text, or with `--fit-to sentences` to sentences as it reads them, with its special tokens and
padded. Refined rows go on from that, on all sentences of the parts, with the dense model's features as the aim; of
several learning rates that is taken which is best on held-out sentences. The model is an encoder whose embedding is the
mean of its last hidden states, as all-MiniLM-L6-v2's is. With `--sentence-transformers` that package embeds, with the
compressed model in the place of its own.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

from calibration_sets import Calibration, Mixture
from protocol import check_tokens, kept_parameters, plain, read_ids
from runs import MORE_STEPS, OURS, REFINED, TWICE, TWICE_FITTED, TWICE_FITTED_JOINT, TWICE_JOINT, Run, row_key
from sentence_sets import BATCH, SentenceTraining, drawn_sentences, embeddings, sentence_batches, sentences_of

from hf_blr import compress
from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile
from hf_blr.targets import find_targets

SEQLEN, WINDOWS = 128, 512
#: sentences of a text that are scored, those that are fitted to, and those that are trained on at most
SENTENCES, FITTED, TRAINED = 1000, 1600, 100_000
#: of the training
EPOCHS, RATE = 8, 5e-4
PROTOCOL = (
    "mean cosine between the sentence embeddings of the dense and the compressed model, on the first 1000 sentences of "
    "5 to 60 words of each text; float32; every row names the tokens that it was fitted to, windows of 128 or sentences"
)
#: steps on each block of a longer fit
STEPS = MORE_STEPS[0]
LONGER = f"{TWICE_FITTED_JOINT}, {STEPS} steps"
#: all outputs of a layer weigh alike, as if nothing were known of what the embedding feels
ALIKE = {"fisher": False, "allocation": "uniform"}
OFF = {**ALIKE, "sequential": False}


def runs(ratios: list[float]) -> list[Run]:
    kinds: list[tuple[str, str, tuple[int, int] | None, dict]] = [
        (OURS, "pivoted", None, {}),
        (REFINED, "pivoted", None, {}),
        (TWICE_FITTED, "pivoted", None, TWICE),
        (f"{TWICE_FITTED}, refined", "pivoted", None, TWICE),
        (TWICE_FITTED_JOINT, "pivoted", None, TWICE_JOINT),
        (f"{TWICE_FITTED_JOINT}, refined", "pivoted", None, TWICE_JOINT),
        (LONGER, "pivoted", None, {**TWICE_JOINT, "block_steps": STEPS}),
        (f"{LONGER}, refined", "pivoted", None, {**TWICE_JOINT, "block_steps": STEPS}),
        (OURS, "blast", (4, 4), {}),
        ("ours, outputs alike", "pivoted", None, ALIKE),
        (OURS, "low_rank", None, {}),
        ("whitened SVD", "low_rank", None, OFF),
    ]
    return [
        Run(
            method,
            structure,
            ratio,
            blocks,
            "refine" if method.endswith("refined") else "compress",
            tuple(settings.items()),
        )
        for ratio in ratios
        for method, structure, blocks, settings in kinds
    ]


def library_embeddings(model: nn.Module, folder: str, sentences: list[str]) -> Tensor:
    """The same by sentence-transformers, which reads the folder and runs this model in the place of its own.

    Raises:
        ImportError: if the package is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "`pip install sentence-transformers`, or leave --sentence-transformers out: the embeddings are the same"
        ) from error
    encoder = SentenceTransformer(folder, device=str(next(model.parameters()).device))
    # releases differ in what they call it
    (own,) = (child for child, module in encoder[0].named_children() if isinstance(module, PreTrainedModel))
    setattr(encoder[0], own, model)
    found = encoder.encode(sentences, batch_size=BATCH, convert_to_tensor=True, normalize_embeddings=True)
    return found.float()


def texts_of(items: list[str]) -> dict[str, str]:
    """Of NAME=FILE each."""
    return {name: plain(Path(path)) for name, _, path in (item.partition("=") for item in items)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id of an encoder")
    parser.add_argument("--parts", nargs="+", required=True, metavar="PART", help="as of quality.py")
    parser.add_argument("--calibration", nargs="+", metavar="PART=SHARE", help="as of quality.py, for windows")
    parser.add_argument("--fit-to", choices=("windows", "sentences"), default="windows", help="of the parts")
    parser.add_argument("--fitted", type=int, default=FITTED, help="sentences of a fit to sentences, at most")
    parser.add_argument("--only", nargs="+", default=["*"], help="labels or patterns, as of quality.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sentences", nargs="+", required=True, metavar="NAME=FILE", help="texts to embed")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7])
    parser.add_argument("--trained", type=int, default=TRAINED, help="sentences of a training, at most")
    parser.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[EPOCHS],
        help="of refined rows, over their sentences; a row for each of several",
    )
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        default=[RATE],
        help="the learning rate of refined rows; of several, the best on held-out sentences after some steps",
    )
    parser.add_argument(
        "--held-out", type=int, default=0, help="sentences of the parts that nothing reads but that choice"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="sentences of a step of refined rows")
    parser.add_argument("--sentence-transformers", action="store_true", help="embed by that package")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="of the model in the rows; the folder's if left out")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    if len(args.rate) > 1 and not args.held_out:
        parser.error("several learning rates are compared on held-out sentences: name --held-out sentences too")
    dense = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {name: sentences_of(text)[:SENTENCES] for name, text in texts_of(args.sentences).items()}
    name = args.name or Path(args.model).name

    def embed(model: nn.Module) -> dict[str, Tensor]:
        if args.sentence_transformers:
            return {text: library_embeddings(model, args.model, sentences) for text, sentences in texts.items()}
        return {text: embeddings(model, tokenizer, sentences) for text, sentences in texts.items()}

    wanted, targets = embed(dense), find_targets(dense)
    total = kept_parameters(dense, targets)
    machine = environment()
    commit = args.commit or machine["commit"]
    file = ResultFile(args.json, {"protocol": PROTOCOL, "environment": {**machine, "commit": commit}}, append=True)
    done = {row_key(row) for row in file.rows}
    chosen = [run for run in runs(args.ratios) if any(fnmatch(run.label, pattern) for pattern in args.only)]
    for seed in args.seeds:
        parts = texts_of(args.parts)
        drawn, left_out = drawn_sentences(parts.values(), seed, args.held_out)
        training = SentenceTraining(dense, tokenizer, drawn[: args.trained], left_out, list(parts), seed, args.batch)
        if args.fit_to == "sentences":
            batches, fitted = sentence_batches(drawn[: args.fitted], tokenizer, parts, seed)
        else:
            mixture = Mixture.parse(args.calibration)
            on = Calibration.draw(dense, read_ids(args.parts, tokenizer), mixture, seed, WINDOWS, SEQLEN)
            batches, fitted = on.batches, on.facts()
        earlier: dict[tuple, tuple[nn.Module, float]] = {}
        trials = [(run, n) for run in chosen for n in (args.epochs if run.kind == "refine" else [0])]
        for run, epochs in trials:
            facts = {"model": name, **run.facts(), **fitted, "commit": commit}
            if epochs:
                facts["finetune_tokens"] = training.tokens(epochs)
            if {row_key({**facts, "dataset": text}) for text in texts} <= done:
                continue
            if run.family not in earlier:
                fit = copy.deepcopy(dense)
                report = compress(fit, run.config(seed), calibration=batches, progress=False)
                earlier = {run.family: (fit, report.seconds)}
            model, seconds = copy.deepcopy(earlier[run.family][0]), earlier[run.family][1]
            facts |= {"kept": kept_parameters(model, targets) / total, "fit_seconds": seconds}
            if epochs:
                facts |= training.refined(run.family, model, args.rate, epochs)
            rows = [
                {
                    **facts,
                    "dataset": text,
                    "sentences": len(texts[text]),
                    "text_sha256": hashlib.sha256("\n".join(texts[text]).encode()).hexdigest(),
                    "cosine": (found * wanted[text]).sum(-1).mean().item(),
                }
                for text, found in embed(model).items()
            ]
            check_tokens([*file.rows, *rows])
            file.add(rows)
            scores = ", ".join(f"{row['dataset']} {row['cosine']:.4f}" for row in rows)
            print(f"{run.label}, seed {seed}: {scores} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
