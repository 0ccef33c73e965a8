"""Measuring models, dense or compressed, through the same lines."""

from hf_blr.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
