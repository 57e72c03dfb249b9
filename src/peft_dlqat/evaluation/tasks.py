"""Accuracy on language-model tasks, by EleutherAI's lm-evaluation-harness (an optional dependency)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.grid_state import random_state_kept
from ..distillation import evaluating
from .merging import temporarily_merged

# Tasks of common-sense reasoning that are usual in papers on low-bit language models, without examples in the prompt.
TASK_SETS: dict[str, list[str]] = {
    "mmlu": ["mmlu"],  # the harness's own group of 57 subjects, with their mean
    "commonsense": ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
}


def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 1,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a causal language model on tasks of the lm-evaluation-harness.

    Adapters are merged while measuring; afterwards weights, adapters, modes (train or eval), the tokenizer and random
    number generators are as they were. The tasks' data come from the Hub, unless a task says otherwise.

    Args:
        model: a causal language model, with adapters or without.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups of the harness, or of [`TASK_SETS`] ("mmlu", "commonsense"); one or several.
        include_path: a folder of further tasks, as YAML files. Where it has all of the tasks, the harness's own, of
            which there are thousands, are not looked through.
        limit: only so many questions of each task, or, below 1, such a share; for trying things out.
        batch_size: sequences in a forward pass, or "auto".
        num_fewshot: examples in the prompt; by default what each task says, mostly none.

    Returns:
        By task (and group), by metric, such as {"piqa": {"acc": 0.77, "acc_stderr": 0.01, ...}}; accuracies are from 0
        to 1. A metric under a filter keeps the filter's name: "exact_match,strict-match". In a run of
        several processes only the first has results; the others get {}.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if there are no tasks, or one is unknown.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"evaluate_tasks needs the lm-evaluation-harness ({error}): pip install peft-dlqat[eval]"
        ) from error
    names = resolve_tasks(tasks)
    manager = task_manager(names, include_path)
    with evaluating(model), random_state_kept():
        # Made before merging, since it ties weights anew, and on a copy of the tokenizer, to which it may add padding.
        harness_model = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, backend="causal"
        )
        with temporarily_merged(model):
            results = lm_eval.simple_evaluate(
                model=harness_model,
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
            )
    return {} if results is None else _flat({**results["results"], **results.get("groups", {})})


def resolve_tasks(tasks: str | Sequence[str]) -> list[str]:
    """Names of tasks, each once, with those of [`TASK_SETS`] in the place of a set's name.

    Args:
        tasks: one name or several.

    Raises:
        ValueError: if there are none.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    names = list(dict.fromkeys(name for each in given for name in TASK_SETS.get(each, [each])))
    if not names:
        raise ValueError(f"tasks={tasks!r} names no task; name tasks of the lm-evaluation-harness, or {[*TASK_SETS]}.")
    return names


def task_manager(names: list[str], include_path: str | os.PathLike[str] | None) -> Any:
    """The harness's index of tasks, with all of the names in it.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if one is unknown.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not os.path.isdir(include_path):
            raise ValueError(f"include_path={os.fspath(include_path)!r} is no folder; it holds tasks as YAML files.")
        own = TaskManager(include_path=os.fspath(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        where = "" if include_path is None else f", nor is it in {os.fspath(include_path)!r}"
        raise ValueError(
            f"the lm-evaluation-harness has no task {', '.join(map(repr, unknown))}{where}; `lm-eval ls tasks` lists "
            f"them, and this package has the sets {[*TASK_SETS]}."
        )
    return manager


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Numbers alone, by task and metric; ",none" says that a metric has no filter."""
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and "," in name  # others are its name, its number of questions, ...
        }
        for task, metrics in results.items()
    }
