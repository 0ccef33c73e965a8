"""Measuring models, dense or compressed, through the same lines."""

from hf_blr.evaluation.perplexity import Perplexity, perplexity
from hf_blr.evaluation.tasks import task_scores

__all__ = ["Perplexity", "perplexity", "task_scores"]
