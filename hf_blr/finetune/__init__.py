"""Fine-tuning the factors with the stock `Trainer`."""

from hf_blr.calibration.training_form import close_bits
from hf_blr.finetune.best import KeepBest
from hf_blr.finetune.callback import BLRCallback
from hf_blr.finetune.dataset import WindowDataset
from hf_blr.finetune.divergence import distillation_loss
from hf_blr.finetune.loop import train
from hf_blr.finetune.refine import refine
from hf_blr.finetune.trainable import factor_parameter_groups, mark_only_factors_trainable

__all__ = [
    "BLRCallback",
    "KeepBest",
    "WindowDataset",
    "close_bits",
    "distillation_loss",
    "factor_parameter_groups",
    "mark_only_factors_trainable",
    "refine",
    "train",
]
