"""Scores on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_blr.evaluation.scorable import check_causal
from hf_blr.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: {task: {metric: score}}
Scores = dict[str, dict[str, float]]


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Scores:
    """What lm-eval's `simple_evaluate` says of a model in memory, dense or compressed.

    Args:
        model: any causal language model of Transformers. Scored in evaluation mode and left as it was.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups of lm-eval.
        folder: with task files of your own, whose names `tasks` may use too.
        num_fewshot: examples in each prompt; None is what each task says.
        limit: documents of each task; None is all of them.
        batch_size: requests in one forward.

    Returns:
        The metrics as lm-eval names them (`acc,none`), with their standard errors (`acc_stderr,none`).

    Raises:
        ImportError: without lm-eval.
        TypeError: if the model predicts no next token.
        ValueError: if lm-eval knows no task of a name.
    """
    check_causal(model)
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"lm-eval scores tasks, and cannot be imported ({error}): pip install lm-eval") from None
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists those that there are")
    with evaluating(model):
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
        )
    return {
        task: {metric: score for metric, score in scores.items() if isinstance(score, float)}
        for task, scores in found["results"].items()
    }
