"""Fine-tune by TRL's SFTTrainer, with the dense model as teacher: the factors, or adapters on factors in four bits."""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_blr
from hf_blr import BLRCallback, BLRConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder of the dense model")
parser.add_argument("--lora", action="store_true", help="train adapters on factors in four bits, not the factors")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seqlen", type=int, default=256, help="tokens of a window that is fitted to")
parser.add_argument("--output", default="tuned")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
bits = {"factor_format": "int4", "dense_format": "int4"} if args.lora else {}
config = BLRConfig("low_rank", ratio=0.7, dataset="builtin", num_samples=32, seqlen=args.seqlen, **bits)
model = AutoModelForCausalLM.from_pretrained(args.model, blr_config=config)

# your own data has these columns, or "messages"
squares = [{"prompt": f"{n} times {n} is", "completion": f" {n * n}."} for n in range(4 * args.steps)]
# the only one of TRL's losses that leaves a teacher the logits
sizes = {"loss_type": "nll", "max_steps": args.steps, "per_device_train_batch_size": 4, "logging_steps": args.steps}
on_gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model,
    SFTConfig(args.output, learning_rate=4e-4, use_cpu=not on_gpu, bf16=on_gpu, **sizes),
    train_dataset=Dataset.from_list(squares),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules=hf_blr.lora_targets(model)) if args.lora else None,
    callbacks=[BLRCallback(teacher=args.model)],
)
trainer.train()
trainer.save_model()
print(trainer.state.log_history[-2])
