"""Which parameters are trained, and how an optimizer should treat them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_blr.calibration.training_form import SCALES, forms_in, open_bits, trained_bits, whole_in_bits
from hf_blr.checkpoint.verify import is_loaded
from hf_blr.linear import blr_modules
from hf_blr.targets import remaining_targets

#: steps of the scales' logarithms over those of factors: of 1, 3.3 and 10 the middle one did best after 24 steps
SCALES_RATE = 3.0
#: steps of codes, as the numbers that they stand for, over those of factors: of 8 bits the same, of fewer smaller,
#: since a code moves far when it moves; of whole matrices still smaller (docs/log.md)
CODES_RATE = {8: 1.0}
FEW_BITS_RATE, WHOLE_RATE = 1 / 3, 1 / 3


def mark_only_factors_trainable(
    model: nn.Module,
    norms: bool = False,
    biases: bool = False,
    also: list[str] | tuple[str, ...] = (),
    bits: str = SCALES,
) -> tuple[int, int]:
    """Freeze everything but the factors of the BLR modules, and a head that no checkpoint brought.

    Such a head (a classifier on a model that was saved without one) holds random numbers, so it trains too.

    Of factors that are kept in bits the scales train, and where `bits` says so codes. They are put into a form for
    that, `formats.FactorInTraining`, which computes the same and is saved as before; `close_bits` ends it.

    A model that carries PEFT adapters is left as PEFT set it up: its adapters train and the factors below
    them stay frozen, because a PEFT checkpoint holds the adapters alone and trained factors would be lost
    with it. To train factors through PEFT name the modules in its `modules_to_save`.

    Args:
        model: a compressed model.
        norms: train the normalisation layers too (weight and bias of each module with "norm" in its class
            name).
        biases: train the other biases too, those of BLR modules among them.
        also: names or name endings of further modules to train whole, such as a fresh "classifier". If whole names
            of projections are among them, the model may be dense.
        bits: what trains of factors in bits: "scales", "factor_codes" or "codes", as in `refine`.

    Returns:
        (trainable, total) numbers of parameters, shared ones counted once.

    Raises:
        ValueError: if the model has no BLR module and no dense projection is asked for, an entry of `also` names no
            module, `bits` is something else, or more than the adapters is asked for on a model with adapters.
    """
    if not blr_modules(model) and set(also).isdisjoint(remaining_targets(model)):
        raise ValueError(
            f"{type(model).__name__} has no BLR module, so there are no factors to train: compress it first, "
            "with hf_blr.compress(model, config) or from_pretrained(..., blr_config=...)"
        )
    if has_adapters(model):
        if norms or biases or also:
            raise ValueError(
                "norms, biases and other modules cannot be trained beside PEFT adapters, whose checkpoint "
                "would not hold them; name them in the adapter config's modules_to_save"
            )
    else:
        open_bits(model, bits)
        model.requires_grad_(False)
        for parameter in wanted_parameters(model, norms, biases, also):
            parameter.requires_grad_(True)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def wanted_parameters(model: nn.Module, norms: bool, biases: bool, also: Iterable[str]) -> list[nn.Parameter]:
    wanted = [*factor_parameters(model), *fresh_head(model).values()]
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            wanted += module.parameters(recurse=False) if norms else ()
        elif biases and isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            wanted.append(bias)
    for ending in also:
        named = [m for name, m in model.named_modules() if name == ending or name.endswith("." + ending)]
        if not named:
            raise ValueError(f"there is no module named or ending in {ending!r} to train in {type(model).__name__}")
        wanted += [parameter for module in named for parameter in module.parameters()]
    return wanted


def fresh_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} outside of the base model that transformers initialised where a checkpoint brought the others.

    None of a model that was made in memory or copied, whose parameters are all alike in that.
    """
    base = getattr(model, "base_model", model)
    named = dict(model.named_parameters())
    if base is model or not any(is_loaded(parameter) for parameter in named.values()):
        return {}
    embedding: Any = getattr(model, "get_output_embeddings", lambda: None)()
    # the head of a language model is tied, or comes with the model; a new vocabulary makes it anew
    known = {id(p) for module in (base, embedding) if module is not None for p in module.parameters()}
    return {name: p for name, p in named.items() if id(p) not in known and not is_loaded(p)}


def frozen_parts(model: nn.Module) -> list[str]:
    """In words, what one might take for a part of the training and that does not train."""
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    dense = [name for name in remaining_targets(model) if name not in trained]
    if not dense:
        return []
    return [f"{len(dense)} projections left dense (train_also takes names): {dense[0]}{', ...' * (len(dense) > 1)}"]


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The factors of all BLR modules, in the model's order, and behind them what trains of those in bits."""
    numbers = [factor for module in blr_modules(model).values() for factor in module.factors().values()]
    return numbers + trained_bits(model)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put anything on the model, by `get_peft_model` or by `model.add_adapter`."""
    return bool(getattr(model, "peft_config", None))


def factor_parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    other_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, of the parameters that are trainable now.

    Factors never decay. Shrinking u and v each is not shrinking their product W: since |u|^2 + |v|^2 is at
    least twice the nuclear norm of u v, it drives the small singular values of W to zero and so eats the rank
    that was paid for.

    Example:
        >>> mark_only_factors_trainable(model)
        >>> optimizer = torch.optim.AdamW(factor_parameter_groups(model, lr=1e-4))
        >>> trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[BLRCallback()], ...)

    Args:
        model: a compressed model, after `mark_only_factors_trainable`.
        lr: learning rate of the factors. Scales, whose steps are relative, take three times as much. Codes that train
            take it in 8 bits and a third of it in fewer, in the numbers that they stand for; those of whole matrices a
            third of that.
        other_lr: learning rate of everything else; None is `lr`.
        weight_decay: of the other matrices (adapters, a head). Vectors do not decay.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter; call mark_only_factors_trainable first")
    other_lr = lr if other_lr is None else other_lr
    scales, codes = {id(form.log_scale) for form in forms_in(model).values()}, codes_rates(model)
    factors = {id(p) for p in factor_parameters(model)} - scales - codes.keys()
    others = [p for p in trainable if id(p) not in scales | codes.keys() | factors]
    groups = [
        {"params": [p for p in trainable if id(p) in factors], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) in scales], "lr": SCALES_RATE * lr, "weight_decay": 0.0},
        *(
            {"params": [p for p in trainable if codes.get(id(p)) == rate], "lr": rate * lr, "weight_decay": 0.0}
            for rate in dict.fromkeys(codes.values())
        ),
        {"params": [p for p in others if p.dim() > 1], "lr": other_lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "lr": other_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def codes_rates(model: nn.Module) -> dict[int, float]:
    """{identity of a parameter: its steps over those of factors} of the codes of all forms, trained or not."""
    whole = whole_in_bits(model)
    return {
        id(form.latent): CODES_RATE.get(form.storage.bits, FEW_BITS_RATE) * (WHOLE_RATE if name in whole else 1)
        for name, form in forms_in(model).items()
    }


def let_gradients_in(model: nn.Module) -> None:
    """Lets re-entrant gradient checkpointing work below frozen embeddings.

    It computes gradients only where an input of the checkpointed block asks for one. Transformers sees to
    that for models that read token ids, and not for those that read pixels.
    """
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpointing and getattr(model, "_require_grads_hook", None) is None:
        let_in: Any = model.enable_input_require_grads
        let_in()
