"""Models, text and a stock Trainer for the tests of training."""

import torch
from tiny import tiny_llama
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_blr.finetune import BLRCallback, WindowDataset
from hf_blr.linear import BLRLinear
from hf_blr.structures import make_spec

STRUCTURES = ("low_rank", "monarch", "blast")


def with_factors(model, bias=False, skip=()):
    """Every projection of the repeated blocks replaced by random factors, structures in turn."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer" in n]
    chosen = [name for name in names if not name.endswith(tuple(skip))] if skip else names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for index, name in enumerate(chosen):
            old = model.get_submodule(name)
            structure = STRUCTURES[index % 3]
            spec = make_spec(structure, old.in_features, old.out_features, ratio=0.7)
            model.set_submodule(name, BLRLinear.from_spec(spec, bias=bias or old.bias is not None))
    return model


def compressed_llama(**kw):
    return with_factors(tiny_llama(**kw))


def windows(count=12, seqlen=16):
    """Windows with something to learn: each counts upward from a random start."""
    starts = torch.randint(0, 200, (count, 1), generator=torch.Generator().manual_seed(5))
    return starts + torch.arange(seqlen)


def arguments(path, kind=TrainingArguments, **kw):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(output_dir=str(path), **{**settings, **kw})


def trainer_for(model, path, callback=None, **kw):
    """A Trainer on `windows()`, with a fresh `BLRCallback` unless one is given; `kw` is for the arguments."""
    data = WindowDataset(windows())
    return Trainer(
        model,
        arguments(path, **kw),
        train_dataset=data,
        eval_dataset=WindowDataset(windows()[:4]),
        callbacks=[BLRCallback() if callback is None else callback],
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def factor_names(model):
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, BLRLinear)]
    return {f"{name}.{factor}" for name, m in modules for factor in m.factors()}
