"""A model, its statistics and what budgets of bits make of it, for the tests of budgets of bits."""

from functools import cache

import torch
from tiny import batches_for, tiny_llama

from hf_blr import BLRConfig, collect_statistics
from hf_blr.compression.bits import formats_of, options_of, share_bits
from hf_blr.compression.layer_trials import Layer
from hf_blr.compression.rounding_trials import trials_of
from hf_blr.plan import resolve_plan

TARGETS = ["q_proj", "down_proj"]


def config(bits, **settings):
    return BLRConfig("auto", bits_per_weight=bits, **{"target_modules": TARGETS, "fit_rounds": 2, **settings})


@cache
def dense():
    # in 16 bits, so that the plain format is among what a budget can buy
    return tiny_llama().bfloat16()


@cache
def statistics():
    return collect_statistics(tiny_llama(), config(4), calibration=batches_for(tiny_llama(), count=4))


@cache
def shared(bits, **settings):
    wanted = config(bits, **settings)
    return share_bits(dense(), resolve_plan(dense(), wanted), statistics(), wanted)


def layer_options(wanted):
    plan = resolve_plan(dense(), wanted)
    formats, free = formats_of(wanted), {name: layer.spec for name, layer in plan.items()}
    layers = {name: Layer(dense(), name, statistics(), wanted) for name in free}
    trials = trials_of(layers, free, formats)
    return layers, {
        name: options_of(layers[name], spec, trials[layers[name].kind], formats, torch.bfloat16, wanted)
        for name, spec in free.items()
    }


@cache
def all_options():
    return layer_options(config(4))
