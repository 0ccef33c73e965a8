import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_bert, tiny_llama, tiny_mixtral, tiny_vit
from trainer_cases import (
    arguments,
    changed,
    compressed_llama,
    factor_names,
    state,
    trainer_for,
    windows,
    with_factors,
)
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_blr.finetune import (
    BLRCallback,
    WindowDataset,
    distillation_loss,
    factor_parameter_groups,
    mark_only_factors_trainable,
)
from hf_blr.finetune.distill import Distiller
from hf_blr.linear import BLRLinear


def checkpointing(reentrant):
    """The Trainer's arguments for gradient checkpointing, `activation_checkpointing` in later versions."""
    old = not hasattr(TrainingArguments, "activation_checkpointing")
    name = "gradient_checkpointing" if old else "activation_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Gradients(TrainerCallback):
    """Keeps the gradients of each step, before clipping has a chance to be seen."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def first_gradients(model, path, callback=None, **kw):
    kept = Gradients()
    trainer = trainer_for(model, path, callback, **{"max_steps": 1, "max_grad_norm": 0.0, **kw})
    trainer.add_callback(kept)
    trainer.train()
    return kept.steps[0], trainer


def assert_same_gradients(left, right, rtol=1e-5):
    assert set(left) == set(right)
    for name, gradient in left.items():
        error = (gradient - right[name]).norm() / right[name].norm()
        assert error < rtol, f"{name}: relative error {error}"


# which parameters train


def test_only_factors_are_marked_and_counted():
    model = compressed_llama()
    trainable, total = mark_only_factors_trainable(model)
    assert trainable_names(model) == factor_names(model)
    assert trainable == sum(m.spec.num_parameters for m in model.modules() if isinstance(m, BLRLinear))
    assert total == sum(p.numel() for p in model.parameters())


def test_norms_biases_and_named_modules_train_on_request():
    model = with_factors(tiny_bert())
    factors = factor_names(model)
    every = dict(model.named_parameters())
    norms = {name for name in every if "LayerNorm" in name}
    biases = {name for name in every if name.endswith(".bias")} - norms

    mark_only_factors_trainable(model, norms=True)
    assert trainable_names(model) == factors | norms
    mark_only_factors_trainable(model, biases=True)
    assert trainable_names(model) == factors | biases
    mark_only_factors_trainable(model, also=["classifier"])
    assert trainable_names(model) == factors | {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="ending in 'clasifier'"):
        mark_only_factors_trainable(model, also=["clasifier"])


def test_a_dense_model_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no BLR module.*compress it first"):
        trainer_for(tiny_llama(), tmp_path)
    # a head of its own is no reason to think that this was meant
    with pytest.raises(ValueError, match="compress it first"):
        mark_only_factors_trainable(tiny_llama(), also=["lm_head"])


def test_parameter_groups_do_not_decay_factors_and_vectors():
    model = compressed_llama()
    mark_only_factors_trainable(model, norms=True, also=["lm_head"])
    factors, head, norms = factor_parameter_groups(model, 1e-3, other_lr=1e-4, weight_decay=0.1)
    assert [group["weight_decay"] for group in (factors, head, norms)] == [0.0, 0.1, 0.0]
    assert [group["lr"] for group in (factors, head, norms)] == [1e-3, 1e-4, 1e-4]
    assert [id(p) for p in head["params"]] == [id(model.lm_head.weight)]
    assert len(norms["params"]) == sum(isinstance(m, LlamaRMSNorm) for m in model.modules())
    assert len(factors["params"]) == len(factor_names(model))
    with pytest.raises(ValueError, match="no trainable parameter"):
        factor_parameter_groups(model.requires_grad_(False), 1e-3)


# training


def test_training_changes_the_factors_alone_and_lowers_the_loss(tmp_path, capsys):
    model = compressed_llama()
    before, factors = state(model), factor_names(model)
    trainer = trainer_for(model, tmp_path, max_steps=12)
    trainer.train()

    assert changed(before, model) == factors
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert optimized == len(factors)
    # left frozen, as documented
    assert trainable_names(model) == factors
    trainable, total = mark_only_factors_trainable(model)
    printed = capsys.readouterr().out
    assert f"BLRCallback trains {trainable:,} of {total:,} parameters" in printed


def test_a_callback_added_later_trains_the_same(tmp_path):
    first, second = compressed_llama(), compressed_llama()
    trainer_for(first, tmp_path / "a", max_steps=3).train()
    late = Trainer(second, arguments(tmp_path / "b", max_steps=3), train_dataset=WindowDataset(windows()))
    late.add_callback(BLRCallback())
    late.train()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_model_that_the_trainer_makes_is_frozen_too(tmp_path):
    data = WindowDataset(windows())
    args = arguments(tmp_path, max_steps=1)
    callbacks = [BLRCallback()]
    trainer = Trainer(model_init=lambda: compressed_llama(), args=args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    assert changed(state(compressed_llama()), trainer.model) == factor_names(trainer.model)


def test_factors_missing_from_the_optimizer_are_noticed(tmp_path):
    model = compressed_llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=WindowDataset(windows()))
    trainer.add_callback(BLRCallback())
    with pytest.raises(RuntimeError, match=r"made without 32 of the factors.*constructor"):
        trainer.train()


def test_norms_train_on_request(tmp_path):
    model = compressed_llama()
    before, norms = state(model), {n for n in model.state_dict() if "norm" in n}
    trainer_for(model, tmp_path, BLRCallback(train_norms=True), max_steps=2).train()
    assert changed(before, model) == factor_names(model) | norms


def test_an_optimizer_of_parameter_groups_is_used(tmp_path):
    model = compressed_llama()
    before = state(model)
    mark_only_factors_trainable(model)
    optimizer = torch.optim.SGD(factor_parameter_groups(model, lr=0.1))
    data = WindowDataset(windows())
    Trainer(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=data,
        optimizers=(optimizer, None),
        callbacks=[BLRCallback()],
    ).train()
    assert changed(before, model) == factor_names(model)


def test_resuming_equals_training_through(tmp_path):
    model = compressed_llama()
    through = copy.deepcopy(model)
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer_for(through, tmp_path / "a", **saving).train()

    resumed = trainer_for(model, tmp_path / "b", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, value in through.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert resumed.state.global_step == 6


def test_the_best_model_comes_back_by_its_perplexity(tmp_path):
    model = compressed_llama()
    # a learning rate that ruins the model at once, so that the first evaluation is the best one
    trainer = trainer_for(
        model,
        tmp_path,
        max_steps=3,
        learning_rate=2.0,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="perplexity",
        greater_is_better=False,
    )
    trainer.train()
    seen = [e["eval_perplexity"] for e in trainer.state.log_history if "eval_perplexity" in e]
    best = min(range(3), key=seen.__getitem__)
    assert seen[best] < max(seen)
    assert trainer.state.best_metric == seen[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(seen[best], rel=1e-5)


def test_the_log_history_holds_what_one_wants_to_see(tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = trainer_for(compressed_llama(), tmp_path, **args)
    untrained = trainer.evaluate()
    assert untrained["eval_perplexity"] == pytest.approx(math.exp(untrained["eval_loss"]))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [e["perplexity"] for e in steps] == pytest.approx([math.exp(e["loss"]) for e in steps])
    assert [e["eval_perplexity"] for e in evaluated] == pytest.approx([math.exp(e["eval_loss"]) for e in evaluated])
    assert steps[-1]["num_input_tokens_seen"] == 2 * 4 * 16 and steps[-1]["train_tokens_per_second"] > 0
    assert "distill_loss" not in steps[0]
    # the user's arguments are as they were
    assert trainer.args.include_num_input_tokens_seen == "no"


def test_weight_decay_on_factors_is_warned_of(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_blr.finetune.said.logger.warning", warned.append)
    trainer_for(compressed_llama(), tmp_path, max_steps=1).train()
    assert not warned
    trainer_for(compressed_llama(), tmp_path, max_steps=1, weight_decay=0.1).train()
    assert "weight_decay=0.1 applies to the factors" in warned[0]


def test_training_in_bfloat16_is_warned_of(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_blr.finetune.said.logger.warning", warned.append)
    trainer_for(compressed_llama().bfloat16(), tmp_path, max_steps=1).train()
    assert not warned
    trainer_for(compressed_llama().bfloat16(), tmp_path, BLRCallback(float32_factors=False), max_steps=1).train()
    assert len(warned) == 1 and "train in bfloat16" in warned[0] and "bf16=True" in warned[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}],
    ids=["bf16", "compiled"],
)
@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])
def test_mixed_precision_and_compiled_training_work(tmp_path, extra, teacher):
    plain, special = (compressed_llama(num_hidden_layers=1) for _ in range(2))
    for model, settings in ((plain, {}), (special, extra)):
        callback = BLRCallback(teacher=tiny_llama(num_hidden_layers=1) if teacher else None)
        before = state(model)
        trainer = trainer_for(model, tmp_path, callback, max_steps=2, **settings)
        trainer.train()
        assert changed(before, model) == factor_names(model)
        assert not model._forward_hooks
        model.last_log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    for key in ("loss", "distill_loss") if teacher else ("loss",):
        assert special.last_log[key] == pytest.approx(plain.last_log[key], rel=2e-2)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, reentrant, teacher):
    def gradients(**kw):
        callback = BLRCallback(teacher=tiny_llama() if teacher else None)
        return first_gradients(compressed_llama(), tmp_path, callback, **kw)[0]

    checkpointed = gradients(**checkpointing(reentrant))
    assert_same_gradients(checkpointed, gradients())


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_works_for_images(tmp_path, reentrant):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]

    def gradients(**kw):
        kept = Gradients()
        model = with_factors(tiny_vit())
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, **kw)
        callbacks = [BLRCallback(train_also=["classifier"]), kept]
        trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
        trainer.train()
        # a classification loss is no logarithm of a perplexity
        assert not any("perplexity" in entry for entry in trainer.state.log_history)
        return kept.steps[0]

    checkpointed = gradients(**checkpointing(reentrant))
    assert_same_gradients(checkpointed, gradients())


# PEFT asks transformers by a name that the latter has deprecated
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_stay_trainable_and_the_factors_under_them_frozen(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_factors(tiny_llama(), skip=["o_proj"])
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    before = state(wrapped)
    trainer = trainer_for(wrapped, tmp_path, max_steps=2)
    trainer.train()
    names = changed(before, wrapped)
    assert names and all("lora_" in name for name in names)
    assert "perplexity" in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="modules_to_save"):
        mark_only_factors_trainable(wrapped, norms=True)


# distillation


def hand_written_loss(model, teacher, batch, weight, temperature):
    """The textbook: mean cross-entropy and mean KL over the positions with a label."""
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    student_logits = model(input_ids=batch["input_ids"]).logits[:, :-1][scored]
    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch["input_ids"]).logits[:, :-1][scored]
    p = (teacher_logits / temperature).softmax(-1)
    divergence = (p * (p.log() - (student_logits / temperature).log_softmax(-1))).sum(-1).mean()
    cross_entropy = F.cross_entropy(student_logits, labels[scored])
    distilled = temperature**2 * divergence
    return (1 - weight) * cross_entropy + weight * distilled, cross_entropy, distilled


@pytest.mark.parametrize("accumulate", [1, 4], ids=["whole-batch", "accumulated"])
def test_distillation_equals_a_hand_written_loss(tmp_path, accumulate):
    tokens = windows(4)
    labels = tokens.clone()
    # transformers 5.0 counts the first label too, which nothing predicts
    labels[:, 0] = -100
    # rows of 15, 5, 11 and 0 scored positions, so that a mean of means would be another number
    labels[1, :11] = -100
    labels[2, 3:7] = -100
    labels[3, :] = -100
    data = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    teacher, reference = tiny_llama(seed=3), compressed_llama()
    mark_only_factors_trainable(reference)
    loss, cross_entropy, distilled = hand_written_loss(
        reference, teacher, {"input_ids": tokens, "labels": labels}, 0.3, 2.0
    )
    loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}

    kept = Gradients()
    trainer = Trainer(
        compressed_llama(),
        arguments(
            tmp_path,
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
        ),
        train_dataset=data,
        callbacks=[BLRCallback(teacher=teacher, distill_weight=0.3, temperature=2.0), kept],
    )
    trainer.train()
    assert_same_gradients(kept.steps[0], expected)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert log["lm_loss"] == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert log["distill_loss"] == pytest.approx(distilled.item(), rel=1e-5)
    assert log["perplexity"] == pytest.approx(math.exp(cross_entropy.item()), rel=1e-5)


def test_each_log_entry_holds_the_losses_since_the_one_before(tmp_path):
    # transformers 5.0 counts the first label too, which nothing predicts
    data = [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in windows()]
    callback = BLRCallback(teacher=tiny_llama(), distill_weight=0.25)
    args = arguments(tmp_path, max_steps=6, logging_steps=2)
    trainer = Trainer(compressed_llama(), args, train_dataset=data, callbacks=[callback])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    mixed = [0.75 * entry["lm_loss"] + 0.25 * entry["distill_loss"] for entry in entries]
    assert len(mixed) == 3 and mixed[0] > mixed[1] > mixed[2]
    assert [entry["loss"] for entry in entries] == pytest.approx(mixed, abs=1e-4)


def balanced_mixtral():
    """A model whose router adds to its loss."""
    return with_factors(tiny_mixtral(output_router_logits=True, router_aux_loss_coef=0.5))


@pytest.mark.parametrize("make", [compressed_llama, balanced_mixtral])
def test_one_pass_over_the_logits_gives_what_the_models_own_loss_and_a_divergence_give(monkeypatch, make):
    labels = windows(3)
    labels[0, :5], labels[2] = -100, -100

    def step(plain):
        """(loss, what is logged, gradients) of a model whose own loss is known as the plain one, or is not."""
        model, calls = make().train(), []
        model.loss_function = lambda *args, **kwargs: calls.append(1) or ForCausalLMLoss(*args, **kwargs)
        if plain:
            monkeypatch.setattr("hf_blr.finetune.distill.ForCausalLMLoss", model.loss_function)
        distiller = Distiller(tiny_llama(), weight=0.3, temperature=2.0, shifts_labels=True)
        distiller.attach(model)
        loss = model(input_ids=windows(3), labels=labels, num_items_in_batch=torch.tensor(40)).loss
        loss.backward()
        assert len(calls) == (not plain)
        # in evaluation it is asked, with the hooks still there
        model.eval()(input_ids=windows(1), labels=windows(1))
        assert len(calls) == 1 + (not plain)
        return loss.item(), distiller.pop_metrics(), {n: p.grad for n, p in model.named_parameters()}

    (wanted_loss, wanted, wanted_gradients), (loss, logged, gradients) = step(plain=False), step(plain=True)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert logged == pytest.approx(wanted, rel=1e-5)
    assert_same_gradients(gradients, wanted_gradients)


def test_the_divergence_is_right_in_chunks_and_by_its_gradient(monkeypatch):
    monkeypatch.setattr("hf_blr.ops.losses.LOGITS_PER_CHUNK", 2 * 6)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 6, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 5, 6, generator=generator)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    loss = distillation_loss(student, teacher, mask, temperature=3.0)
    p, q = (teacher[mask] / 3).softmax(-1), (student[mask] / 3).softmax(-1)
    assert loss.item() == pytest.approx(9 * (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)

    (gradient,) = torch.autograd.grad(loss, student)
    # d KL / d logits = (q - p) / temperature for each position, over the seven that count
    torch.testing.assert_close(gradient[mask], 9 * (q - p).detach() / 3 / 7)
    assert not gradient[~mask].any()
    assert distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(student, teacher, mask, num_items=14).item() == pytest.approx(
        distillation_loss(student, teacher, mask).item() / 2
    )


def test_distillation_lowers_the_divergence_and_leaves_the_teacher_alone(tmp_path):
    model, teacher = compressed_llama(), tiny_llama()
    before = state(teacher)
    callback = BLRCallback(teacher=teacher, distill_weight=1.0)
    trainer = trainer_for(model, tmp_path, callback, max_steps=15, eval_strategy="steps", eval_steps=15)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "distill_loss" in entry]
    assert logs[-1]["distill_loss"] < 0.8 * logs[0]["distill_loss"]
    assert not changed(before, teacher)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not model._forward_hooks and not model._forward_hooks_with_kwargs
    # evaluation counts the model's own loss
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated == pytest.approx([trainer_for(model, tmp_path).evaluate()["eval_loss"]], rel=1e-5)


def test_evaluation_in_the_middle_of_a_step_is_not_distilled():
    model, batch = compressed_llama(), windows(2)
    distiller = Distiller(tiny_llama(), weight=0.5, temperature=1.0, shifts_labels=True)
    own = model(input_ids=batch, labels=batch).loss.item()
    distiller.attach(model)
    assert model(input_ids=batch, labels=batch).loss.item() == own
    assert model.train()(input_ids=batch, labels=batch).loss.item() != pytest.approx(own, rel=1e-3)
    distiller.detach()
    assert model(input_ids=batch, labels=batch).loss.item() == own


def test_the_loss_is_the_models_own_again_after_an_exception(tmp_path, capsys):
    model = compressed_llama()
    calls = []

    def fail_later(module, args, kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")

    failing = model.model.layers[1].register_forward_pre_hook(fail_later, with_kwargs=True)
    trainer = trainer_for(model, tmp_path, BLRCallback(teacher=tiny_llama()))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    failing.remove()
    assert trainer.state.global_step == 2
    assert not model._forward_hooks and not model._forward_hooks_always_called
    # and training can start again
    trainer.train()
    assert not model._forward_hooks
    assert capsys.readouterr().out.count("BLRCallback trains") == 1


def test_a_hook_left_by_a_failed_backward_goes_with_close(tmp_path):
    model, callback = compressed_llama(), BLRCallback(teacher=tiny_llama())
    factor = next(m for m in model.modules() if isinstance(m, BLRLinear)).u
    failing = factor.register_hook(lambda gradient: gradient.reshape(-1)[: -1 // 0])
    with pytest.raises(ZeroDivisionError):
        trainer_for(model, tmp_path, callback).train()
    failing.remove()
    callback.close()
    assert not model._forward_hooks


def test_a_teacher_is_loaded_by_its_path(tmp_path):
    tiny_llama(seed=3).save_pretrained(tmp_path / "teacher")
    by_path = BLRCallback(teacher=str(tmp_path / "teacher"))
    by_model = BLRCallback(teacher=tiny_llama(seed=3))
    left, _ = first_gradients(compressed_llama(), tmp_path / "a", by_path)
    right, _ = first_gradients(compressed_llama(), tmp_path / "b", by_model)
    assert_same_gradients(left, right, rtol=1e-6)


def test_images_can_be_distilled_too(tmp_path):
    teacher, model = tiny_vit(), with_factors(tiny_vit())
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    data = [{"pixel_values": image, "labels": y} for image, y in zip(images, labels, strict=True)]
    with torch.no_grad():
        student_logits, teacher_logits = model(images).logits, teacher(images).logits
    divergence = F.kl_div(student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean")
    callback = BLRCallback(teacher=teacher, distill_weight=0.25)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=data, callbacks=[callback])
    trainer.train()
    expected = 0.75 * F.cross_entropy(student_logits, labels) + 0.25 * divergence
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


# a hook that is called a second time for its own exception would warn
@pytest.mark.filterwarnings("error:.*always_call")
def test_impossible_distillation_is_refused(tmp_path):
    model = compressed_llama()
    with pytest.raises(ValueError, match="the teacher is the model that is trained"):
        trainer_for(model, tmp_path, BLRCallback(teacher=model)).train()
    with pytest.raises(ValueError, match=r"\[4, 16, 300\] and \[4, 16, 257\].*same tokenizer"):
        trainer_for(model, tmp_path, BLRCallback(teacher=tiny_llama(vocab_size=300))).train()
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(model, tmp_path, BLRCallback(teacher=tiny_llama()), label_smoothing_factor=0.1).train()
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"distill_weight": 0.0}, ValueError, r"in \(0, 1\], got 0.0"),
        ({"distill_weight": 1.5}, ValueError, "got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"distill_weight": 0.9}, ValueError, "distill_weight=0.9 .*there is none: give teacher="),
        ({"temperature": 2.0}, ValueError, "temperature=2.0 .*there is none: give teacher="),
        ({"teacher": 3}, TypeError, "name or path of one, got int"),
    ],
    ids=["weight-0", "weight-1.5", "temperature", "weight-alone", "temperature-alone", "teacher"],
)
def test_bad_settings_are_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        BLRCallback(**kwargs)


def test_windows_become_inputs_and_labels():
    tokens = windows(3)
    data = WindowDataset(tokens.int())
    assert len(data) == 3
    assert torch.equal(data[1]["input_ids"], tokens[1]) and torch.equal(data[1]["labels"], tokens[1])
    assert data[1]["labels"].dtype == torch.int64
    for bad in (tokens[0], tokens.float()):
        with pytest.raises(ValueError, match=r"shape \[windows, seqlen\]"):
            WindowDataset(bad)
