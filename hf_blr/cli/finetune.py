"""fine-tune the factors of a compressed model with the Hugging Face Trainer

Only the factors are trained; with --teacher the dense model's predictions are part of the loss.

Example: hf-blr finetune out tuned --dataset wikitext2 --teacher HuggingFaceTB/SmolLM2-135M --steps 200
"""

from __future__ import annotations

import argparse

from hf_blr.cli import loading, options, saving
from hf_blr.markdown import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(
        parser,
        help="folder or hub id of a compressed causal language model",
        dtype=None,
        dtype_help="to train and save in; left out, float32 to train in and MODEL's own to save in",
    )
    options.add_output(parser)
    options.add_dataset(parser, "wikitext2")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--teacher", metavar="MODEL", help="dense model to distil from")
    parser.add_argument("--distill-weight", type=float, help="share of the distillation loss, 0 to 1; 0.5 if left out")
    parser.add_argument(
        "--held-out",
        metavar="DATASET",
        type=options.calibration_text,
        help="a text of another kind: the training stops when the model no longer comes closer to --teacher there, and "
        "keeps the factors that were closest",
    )
    parser.add_argument("--train-norms", action="store_true", help="train the normalisation layers too")
    parser.add_argument(
        "--train-bits",
        choices=("scales", "factor_codes", "codes"),
        default="scales",
        help="what trains of layers in bits: scales; also the codes of factors; also those of whole matrices",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--seed", type=int, default=0, help="of which windows are read, and in which order")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from hf_blr.calibration.held_out import MOST_TOKENS
    from hf_blr.checkpoint.origin import public_command, record_origin, score_row
    from hf_blr.checkpoint.record import holders
    from hf_blr.evaluation import perplexity
    from hf_blr.finetune import BLRCallback, KeepBest, train
    from hf_blr.finetune.callback import DISTILL_WEIGHT
    from hf_blr.finetune.teacher import load_teacher
    from hf_blr.text import load_windows, scored_dataset

    if args.held_out is not None and args.teacher is None:
        raise ValueError("--held-out compares the model with a dense one: name it as --teacher")
    if args.distill_weight is not None and args.teacher is None:
        raise ValueError("--distill-weight is about what a dense model predicts: name it as --teacher")
    saving.check_output(args.output, args.overwrite)
    stored = AutoConfig.from_pretrained(args.model).dtype if args.dtype is None else None
    # most steps of a training are so small that bfloat16 rounds them away
    args.dtype = args.dtype or "float32"
    model, reader = loading.load_model(args.model, args)
    loading.check_language_model(model, args.model)
    tokenizer = loading.tokenizer_of(reader)
    teacher = None if args.teacher is None else load_teacher(args.teacher, model)
    # of text that a model writes, the dense one writes the better
    author = model if teacher is None else teacher
    windows = load_windows(args.dataset, author, tokenizer, args.seqlen, args.steps * args.batch_size, args.seed)
    callback = BLRCallback(
        train_norms=args.train_norms,
        teacher=teacher,
        distill_weight=DISTILL_WEIGHT if args.distill_weight is None else args.distill_weight,
        train_bits=args.train_bits,
    )
    best = None
    if teacher is not None and args.held_out is not None:
        some = max(1, MOST_TOKENS // args.seqlen)
        best = KeepBest(teacher, load_windows(args.held_out, teacher, tokenizer, args.seqlen, some, args.seed))
    evaluation = {"dataset": scored_dataset(args.dataset, author), "seqlen": args.seqlen}
    if args.gradient_checkpointing:
        # transformers 5.23 renames the method
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    before = perplexity(model, tokenizer, **evaluation)
    history = train(
        model,
        windows,
        [callback, *([best] if best else [])],
        output_dir=args.output / "checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    if stored is not None:
        model.to(dtype=stored)
    after = perplexity(model, tokenizer, **evaluation)
    print(format_table([{"": "before", "perplexity": before.ppl}, {"": "after", "perplexity": after.ppl}]))
    print(after.protocol)
    if best is not None:
        history += best.log
        least = min(row["held_out_divergence"] for row in best.log)
        first = best.log[0]["held_out_divergence"]
        print(f"divergence from the teacher on held-out text: {first:.4f} before, {least:.4f} after, in nats a token")
    scores = [score_row(name, score.to_dict()) for name, score in (("before training", before), ("after", after))]
    record_origin(holders(model), trained=public_command(args.words), scores=scores)
    saving.save(model, reader, args.output)
    result = {"model": args.model, "before": before.to_dict(), "after": after.to_dict(), "history": history}
    saving.write_json(args.json, result)
