"""Compress a causal language model, compare perplexities, save and load. `--help` lists the options."""

import argparse
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_blr
from hf_blr import BLRConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder")
parser.add_argument("--ratio", type=float, default=0.7, help="kept / dense parameters of each projection")
parser.add_argument("--seqlen", type=int, default=1024)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
dense = AutoModelForCausalLM.from_pretrained(args.model)
config = BLRConfig("blast", ratio=args.ratio, dataset="builtin", num_samples=32, seqlen=args.seqlen)
model = AutoModelForCausalLM.from_pretrained(args.model, blr_config=config)

for name, each in (("dense", dense), ("blast", model)):
    result = hf_blr.perplexity(each, tokenizer, "builtin", seqlen=args.seqlen, max_windows=8)
    print(f"{name}: {sum(p.numel() for p in each.parameters()) / 1e6:.1f} M parameters, perplexity {result.ppl:.2f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("The for statement is used to", return_tensors="pt")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
