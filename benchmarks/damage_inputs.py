"""What callers get wrong: models, configs and calibration batches that no compression may begin with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from damage import HEADS, SIZES, WRONG_VALUES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.config import option_fields
from hf_blr.targets import find_targets

#: (arguments of `compress` besides the model, names of which a clear refusal has one)
Wrong = tuple[dict[str, Any], list[str]]


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, architectures=["LlamaForCausalLM"])).eval()


def ids(rng: Random) -> Tensor:
    shape = (rng.randint(1, 3), rng.randint(4, 16))
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def batches(rng: Random, wrong: Any) -> dict[str, Any]:
    """A few right ones, and this one at a random place among them."""
    given: list[Any] = [{"input_ids": ids(rng)} for _ in range(rng.randint(0, 2))]
    given.insert(rng.randint(0, len(given)), wrong)
    return {"config": BLRConfig("low_rank", ratio=0.6), "calibration": given}


def outside_vocabulary(model: LlamaForCausalLM, rng: Random) -> Wrong:
    wrong = ids(rng)
    wrong.view(-1)[rng.randrange(wrong.numel())] = bad = rng.choice([-1, SIZES["vocab_size"], 10**6, -(10**6)])
    return batches(rng, {"input_ids": wrong}), [str(bad), "vocabulary"]


def misshapen_ids(model: LlamaForCausalLM, rng: Random) -> Wrong:
    wrong = rng.choice([ids(rng)[0], ids(rng)[0, 0], ids(rng)[:, :0]])
    # in a dict three axes may be right: some models choose among several texts
    return batches(rng, rng.choice([wrong, {"input_ids": wrong}, ids(rng)[None]])), ["shape"]


def ids_of_floats(model: LlamaForCausalLM, rng: Random) -> Wrong:
    wrong = ids(rng).to(rng.choice([torch.float32, torch.float16, torch.bool, torch.complex64]))
    return batches(rng, rng.choice([wrong, {"input_ids": wrong}])), [str(wrong.dtype)]


def not_batches(model: LlamaForCausalLM, rng: Random) -> Wrong:
    wrong = rng.choice(["text", 3, None, [1, 2], 0.5, b"x", {"input_ids": [1, 2]}, {"input_ids": None}, {}, object()])
    return batches(rng, wrong), ["batch"]


def no_batches(model: LlamaForCausalLM, rng: Random) -> Wrong:
    wrong = rng.choice([[], (), iter([]), 3, {"input_ids": ids(rng)}, ids(rng), 0.5])
    return {**batches(rng, None), "calibration": wrong}, ["batch"]


def mask_of_another_shape(model: LlamaForCausalLM, rng: Random) -> Wrong:
    given = ids(rng)
    rows, length = given.shape
    mask = torch.ones(rng.choice([(rows, length + 1), (rows + 1, length), (rows, length - 1), (length,)]))
    return batches(rng, {"input_ids": given, "attention_mask": mask.long()}), ["attention_mask", "mask"]


def hidden_by_the_mask(model: LlamaForCausalLM, rng: Random) -> Wrong:
    given = ids(rng)
    wrong = {"input_ids": given, "attention_mask": torch.zeros_like(given)}
    return {**batches(rng, None), "calibration": [wrong] * rng.randint(1, 3)}, ["attention_mask", "mask"]


def config_value(model: LlamaForCausalLM, rng: Random) -> Wrong:
    values = (*WRONG_VALUES, -(10**9), float("nan"), True, b"x", object())
    wrong = [(f.name, v) for f in option_fields() for v in values if f.metadata["check"](v) is not None]
    name, value = rng.choice(wrong)
    return {"config": lambda: BLRConfig(**{name: value})}, [name]


def config_key(model: LlamaForCausalLM, rng: Random) -> Wrong:
    key = "".join(rng.choices("abcdefgh", k=6))
    return {"config": lambda: BLRConfig("low_rank", ratio=0.6, **{key: 1})}, [key]


def blocks_that_do_not_divide(model: LlamaForCausalLM, rng: Random) -> Wrong:
    blocks = rng.choice([5, 7, 11, 64, 1000, (5, 4), (4, 7)])
    return {"config": BLRConfig(rng.choice(["monarch", "blast"]), ratio=0.6, num_blocks=blocks)}, ["block"]


def targets_of_another_model(model: LlamaForCausalLM, rng: Random) -> Wrong:
    name = "".join(rng.choices("abcdefgh", k=6))
    wrong = [name] if rng.random() < 0.5 else ["q_proj", name]
    return {"config": BLRConfig("low_rank", ratio=0.6, target_modules=wrong)}, [name]


def weight_not_finite(model: LlamaForCausalLM, rng: Random) -> Wrong:
    name = rng.choice(sorted(find_targets(model)))
    weight = model.get_submodule(name).weight.data.view(-1)
    weight[rng.randrange(len(weight))] = rng.choice([float("nan"), float("inf"), -float("inf")])
    given = {"calibration": [ids(rng)]} if rng.random() < 0.5 else {}
    return {"config": BLRConfig("low_rank", ratio=0.6), **given}, [name]


def plan_of_another_model(model: LlamaForCausalLM, rng: Random) -> Wrong:
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 64}, **HEADS))
    compress(other, BLRConfig("low_rank", ratio=0.6), progress=False)
    layers = copy.deepcopy(other.config.quantization_config.to_dict()["layers"])
    name = rng.choice(sorted(layers))
    if rng.random() < 0.5:
        layers = {f"elsewhere.{name}": layers[name]}
    return {"config": BLRConfig(ratio=0.6, layers=layers)}, list(layers)


def statistics_of_another_model(model: LlamaForCausalLM, rng: Random) -> Wrong:
    config = BLRConfig("low_rank", ratio=0.6)
    found = collect_statistics(model, config, calibration=[ids(rng)])
    name = rng.choice(sorted(found.grams))
    grams = dict(found.grams)
    if rng.random() < 0.5:
        del grams[name]
    else:
        grams[name] = torch.eye(7)
    return {"config": config, "statistics": type(found)(grams, found.output_grams, found.tokens)}, [name]


def no_statistics(model: LlamaForCausalLM, rng: Random) -> Wrong:
    """Matrices, or counts beside them, that no text can sum up to."""
    config = BLRConfig("low_rank", ratio=0.6)
    found = collect_statistics(model, config, calibration=[ids(rng)])
    if rng.random() < 0.3:
        tokens = rng.choice([0, -1, 2.5, "x", None, True, float("nan")])
        wrong = rng.choice([replace(found, tokens=tokens), {"grams": found.grams}, [found]])
        return {"config": config, "statistics": wrong}, ["statistics"]
    kind = rng.choice(["grams", "output_grams"])
    matrices = dict(getattr(found, kind))
    name = rng.choice(sorted(matrices))
    right = matrices[name]
    dtype = rng.choice([torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    other = [right.to(dtype), right.to("meta"), right.to_sparse(), right.tolist(), None, right.flatten(), -right - 1]
    uneven = right + right.abs().max() * torch.ones_like(right).triu(1)
    matrices[name] = rng.choice([*other, uneven])
    return {"config": config, "statistics": replace(found, **{kind: matrices})}, [name]


def no_limit(model: LlamaForCausalLM, rng: Random) -> Wrong:
    wrong = rng.choice([-1, "lots", "", True, float("nan"), 1e6, [], "-1GB", {}])
    return {**batches(rng, {"input_ids": ids(rng)}), "max_memory": wrong}, ["max_memory"]


def no_shards(model: LlamaForCausalLM, rng: Random) -> Wrong:
    return {**batches(rng, {"input_ids": ids(rng)}), "shards": rng.choice(["out", 3, True, [], {}])}, ["shards"]


def weight_of_no_numbers(model: LlamaForCausalLM, rng: Random) -> Wrong:
    name = rng.choice(sorted(find_targets(model)))
    layer = model.get_submodule(name)
    dtype = rng.choice([torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    given = {"calibration": [ids(rng)]} if rng.random() < 0.5 else {}
    return {"config": BLRConfig("low_rank", ratio=0.6), **given}, [name]


def no_such_text(model: LlamaForCausalLM, rng: Random) -> Wrong:
    name = "".join(rng.choices("abcdefgh", k=6))
    text = rng.choice([f"{name}.txt", f"/nowhere/{name}", f"{name}=0.5,builtin=0.5", f"builtin=0.5,{name}"])
    return {"config": BLRConfig("low_rank", ratio=0.6, dataset=text)}, [name, "tokenizer"]


INPUTS: dict[str, Callable[[LlamaForCausalLM, Random], Wrong]] = {
    "text: ids outside of the vocabulary": outside_vocabulary,
    "text: ids of another shape": misshapen_ids,
    "text: ids that are no integers": ids_of_floats,
    "text: no batch": not_batches,
    "text: no list of batches": no_batches,
    "text: a mask of another shape": mask_of_another_shape,
    "text: a mask that hides all": hidden_by_the_mask,
    "text: no such file or dataset": no_such_text,
    "argument: a value of a wrong type": config_value,
    "argument: an unknown one": config_key,
    "argument: blocks that do not divide": blocks_that_do_not_divide,
    "argument: targets that are not there": targets_of_another_model,
    "argument: another model's plan": plan_of_another_model,
    "argument: another model's statistics": statistics_of_another_model,
    "argument: no statistics": no_statistics,
    "argument: no limit of memory": no_limit,
    "argument: no shards": no_shards,
    "model: a weight that is not finite": weight_not_finite,
    "model: a weight that is no floating-point number": weight_of_no_numbers,
}


def called(kind: str, rng: Random) -> tuple[LlamaForCausalLM, Callable[[], object], list[str]]:
    """(the model, a call that must be refused, names of which a clear refusal has one)."""
    model = dense()
    given, names = INPUTS[kind](model, rng)
    config = given.pop("config")

    def call() -> object:
        made = config() if callable(config) else config
        return compress(model, made, progress=False, **given)

    return model, call, names
