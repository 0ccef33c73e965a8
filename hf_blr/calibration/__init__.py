"""Running a model on calibration data, to learn what the fits need to know."""

from hf_blr.calibration.batches import collect_statistics
from hf_blr.calibration.denoising import denoising_batches
from hf_blr.calibration.fisher import Statistics

__all__ = ["Statistics", "collect_statistics", "denoising_batches"]
