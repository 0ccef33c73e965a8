"""Compress an image classifier on a folder of images, and count how often it still answers as the dense one does."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_blr
from hf_blr import BLRConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", type=Path, help="a folder of images; every eighth is kept for the comparison")
parser.add_argument("--model", default="google/vit-base-patch16-224", help="hub id or folder")
parser.add_argument("--ratio", type=float, default=0.7, help="kept / dense parameters of the projections together")
parser.add_argument("--output", default="classifier")
args = parser.parse_args()

processor = AutoImageProcessor.from_pretrained(args.model)
dense, model = (AutoModelForImageClassification.from_pretrained(args.model).eval() for _ in range(2))
files = sorted(file for file in args.images.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))


def batch_of(chosen: list[Path]) -> dict[str, torch.Tensor]:
    return processor([Image.open(file).convert("RGB") for file in chosen], return_tensors="pt")


fitted = [file for i, file in enumerate(files) if i % 8]
batches = (batch_of(fitted[i : i + 16]) for i in range(0, len(fitted), 16))
print(hf_blr.compress(model, BLRConfig("blast", ratio=args.ratio), calibration=batches))
with torch.no_grad():
    apart = batch_of(files[::8])
    same = dense(**apart).logits.argmax(-1) == model(**apart).logits.argmax(-1)
print(f"the same class for {same.sum()} of {len(same)} other images")
model.save_pretrained(args.output)
processor.save_pretrained(args.output)
