"""Fine-tune a compressed checkpoint on several GPUs, one process each, with the dense model as teacher in each of them.

hf-blr compress HuggingFaceTB/SmolLM2-135M smaller --structure blast --ratio 0.7 --dataset builtin
torchrun --nproc-per-node 2 examples/finetune_gpus.py smaller
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_blr import BLRCallback
from hf_blr.finetune import WindowDataset
from hf_blr.text import load_windows

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a compressed checkpoint: it is fitted once, not in every process")
parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder of the dense model")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seqlen", type=int, default=256)
parser.add_argument("--output", default="tuned")
args = parser.parse_args()

# before anything else: it starts the process group
where = {"use_cpu": not torch.cuda.is_available()}
settings = TrainingArguments(
    args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=4e-4, **where
)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
windows = load_windows("builtin", model, tokenizer, args.seqlen, 4 * args.steps * settings.world_size)
trainer = Trainer(
    model,
    settings,
    train_dataset=WindowDataset(windows),
    callbacks=[BLRCallback(teacher=args.teacher)],
)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    tokenizer.save_pretrained(args.output)
    print(f"{settings.world_size} processes: {trainer.state.log_history[-1]}")
