"""Compress an encoder of sentences, and see how near its embeddings stay to the dense ones."""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

import hf_blr
from hf_blr import BLRConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
parser.add_argument("--ratio", type=float, default=0.7, help="kept / dense parameters of the projections together")
parser.add_argument("--output", default="encoder")
args = parser.parse_args()

things, deeds = ("The cat", "A train", "My sister", "Some rain"), ("sleeps", "is late", "sings", "falls", "is here")
sentences = [f"{thing} {deed} {when}." for thing in things for deed in deeds for when in ("today", "again", "at night")]
held_out, fitted = sentences[::6], [text for i, text in enumerate(sentences) if i % 6]

tokenizer = AutoTokenizer.from_pretrained(args.model)
dense, model = (AutoModel.from_pretrained(args.model).eval() for _ in range(2))
# sentences as the encoder reads them, each in a row of its own; padding does not count
batches = [tokenizer(fitted[i : i + 10], return_tensors="pt", padding=True) for i in range(0, len(fitted), 10)]
print(hf_blr.compress(model, BLRConfig("low_rank", ratio=args.ratio), calibration=batches))


@torch.no_grad()
def embed(encoder: torch.nn.Module) -> torch.Tensor:
    """The mean over each sentence's tokens, of length one: `[sentences, features]`."""
    batch = tokenizer(held_out, return_tensors="pt", padding=True)
    mask = batch["attention_mask"][..., None]
    states = encoder(**batch).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


print(f"cosine with the dense embeddings of other sentences: {(embed(dense) * embed(model)).sum(-1).mean():.4f}")
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
