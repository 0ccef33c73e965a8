"""Train LoRA adapters on factors in four bits, as QLoRA does on dense weights in four bits."""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_blr
from hf_blr import BLRConfig
from hf_blr.finetune import WindowDataset
from hf_blr.text import load_windows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder of the dense model")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seqlen", type=int, default=256)
parser.add_argument("--output", default="adapter")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
# what the budget leaves dense is stored in four bits too
bits = {"factor_format": "int4", "dense_format": "int4"}
config = BLRConfig("low_rank", ratio=0.7, dataset="builtin", num_samples=32, seqlen=args.seqlen, **bits)
model = AutoModelForCausalLM.from_pretrained(args.model, blr_config=config)
windows = load_windows("builtin", model, tokenizer, args.seqlen, 4 * args.steps)

adapted = get_peft_model(model, LoraConfig(r=8, target_modules=hf_blr.lora_targets(model)))
adapted.print_trainable_parameters()
trainer = Trainer(
    adapted,
    TrainingArguments(args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-3),
    train_dataset=WindowDataset(windows),
)
trainer.train()
adapted.save_pretrained(args.output)
print(trainer.state.log_history[-1])
