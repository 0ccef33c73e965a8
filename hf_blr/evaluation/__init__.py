"""Measuring models, dense or compressed, through the same lines."""

from hf_blr.evaluation.perplexity import perplexity
from hf_blr.evaluation.score import Perplexity
from hf_blr.evaluation.tasks import task_scores

__all__ = ["Perplexity", "perplexity", "task_scores"]
