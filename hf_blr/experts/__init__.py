"""Mixtures of experts that Transformers keeps in 3-D parameters: found, factorised expert by expert, and run.

A tensor of E experts has one spec, and factors with a leading axis of E. While fits are looked for, each expert is a
linear layer of its own (`opened`), so that whatever fits linear layers fits experts.
"""

from hf_blr.experts.layers import ExpertsLinear
from hf_blr.experts.module import Experts, put_layer
from hf_blr.experts.multiplied import multiply_out
from hf_blr.experts.opened import OpenedExperts, expanded, lies_in_experts, opened
from hf_blr.experts.plain import PlainExperts, PlainFactors
from hf_blr.experts.tensors import ExpertsTensor, dense_layers, layer_named, tensors_of

__all__ = [
    "Experts",
    "ExpertsLinear",
    "ExpertsTensor",
    "OpenedExperts",
    "PlainExperts",
    "PlainFactors",
    "dense_layers",
    "expanded",
    "layer_named",
    "lies_in_experts",
    "multiply_out",
    "opened",
    "put_layer",
    "tensors_of",
]
