"""Compress an encoder of sentence-transformers, and see how near its embeddings stay to the dense ones."""

import argparse

from sentence_transformers import SentenceTransformer

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

encoder = SentenceTransformer(args.model)
dense = encoder.encode(held_out, normalize_embeddings=True)
# sentences as the encoder reads them, each in a row of its own; padding does not count
read = encoder.tokenizer
batches = [read(fitted[i : i + 10], return_tensors="pt", padding=True) for i in range(0, len(fitted), 10)]
# its first module holds the model of transformers
print(hf_blr.compress(encoder[0].auto_model, BLRConfig("low_rank", ratio=args.ratio), calibration=batches))
encoder.save(args.output)

again = SentenceTransformer(args.output)  # loads the factors, because hf_blr is imported
cosines = (again.encode(held_out, normalize_embeddings=True) * dense).sum(-1)
print(f"cosine with the dense embeddings of other sentences: {cosines.mean():.4f}")
