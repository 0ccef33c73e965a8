"""Running a model on calibration data, to learn what the fits need to know."""

from hf_blr.calibration.batches import collect_statistics
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.store import Store

__all__ = ["Statistics", "Store", "collect_statistics"]
