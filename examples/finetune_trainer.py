"""Fine-tune the factors of a compressed model with the stock Trainer, distilling from the dense one."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_blr import BLRCallback, BLRConfig
from hf_blr.finetune import WindowDataset
from hf_blr.text import load_windows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder of the dense model")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seqlen", type=int, default=256)
parser.add_argument("--output", default="tuned")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
config = BLRConfig("blast", ratio=0.7, dataset="builtin", num_samples=32, seqlen=args.seqlen)
model = AutoModelForCausalLM.from_pretrained(args.model, blr_config=config)
windows = load_windows("builtin", model, tokenizer, args.seqlen, 4 * args.steps)

trainer = Trainer(
    model,
    TrainingArguments(args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=4e-4),
    train_dataset=WindowDataset(windows),
    callbacks=[BLRCallback(teacher=args.model, distill_weight=0.5)],
)
trainer.train()
trainer.save_model()
print(trainer.state.log_history[-1])
