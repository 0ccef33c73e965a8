"""Compress a mixture of experts: each expert is fitted to the tokens that chose it, and a share of all."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_blr
from hf_blr import BLRConfig
from hf_blr.integration import blr_modules

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924", help="hub id or folder")
parser.add_argument("--ratio", type=float, default=0.6, help="kept / dense parameters of the projections together")
parser.add_argument("--bits", type=float, help="in place of the ratio, bits for each of these numbers")
parser.add_argument("--seqlen", type=int, default=512)
parser.add_argument("--output", default="mixture")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
text = {"dataset": "builtin", "num_samples": 32, "seqlen": args.seqlen}
if args.bits is None:
    # low-rank has a closed form, and there are many experts
    config = BLRConfig("low_rank", ratio=args.ratio, **text)
else:
    # structure, rank and format of each tensor of experts, from trials on a few of them
    config = BLRConfig("auto", bits_per_weight=args.bits, **text)
model = AutoModelForCausalLM.from_pretrained(args.model, blr_config=config)
experts = [name for name in blr_modules(model) if "experts" in name]
print(f"{len(experts)} tensors of experts are compressed, {experts[0]} among them")
print(hf_blr.perplexity(model, tokenizer, "builtin", seqlen=args.seqlen, max_windows=4))
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
