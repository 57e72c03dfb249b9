"""What `finetune.py` measures on the held-out text."""

from __future__ import annotations

import datasets
import evaluate
import torch
from data import InputError
from torch import nn
from tqdm.auto import tqdm


@torch.no_grad()
def evaluate_model(
    model: nn.Module, blocks: datasets.Dataset, batch_size: int, metric: evaluate.EvaluationModule | None, name: str
) -> tuple[float, float, dict[str, float]]:
    """Loss in nats a token, accuracy of the next token, and what the metric says about the same predictions."""
    model.eval()
    device = next(model.parameters()).device
    loss = correct = count = 0.0
    for start in tqdm(range(0, len(blocks), batch_size), desc=f"held-out text, {name}", leave=False):
        ids = blocks[start : start + batch_size]["input_ids"].to(device)
        logits, labels = model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        predictions = logits.argmax(-1)
        correct += (predictions == labels).sum().item()
        count += labels.numel()
        if metric is not None:
            metric.add_batch(predictions=predictions.tolist(), references=labels.tolist())
    return loss / count, correct / count, {} if metric is None else metric.compute()


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric of `evaluate`, from the Hub or from a script, that compares integers (the next tokens)."""
    try:
        metric = evaluate.load(name)
    except (OSError, ImportError) as error:
        raise InputError(
            f"cannot load the metric {name!r}: {error}\n--metric takes a metric's id on the Hub, such as accuracy, or "
            "the path of a metric script, such as ./my_metric/my_metric.py."
        ) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    kinds = {key: getattr(feature, "dtype", str(feature)) for key, feature in features.items()}
    if set(kinds) != {"predictions", "references"} or not all(kind.startswith("int") for kind in kinds.values()):
        raise InputError(
            f"the metric {name!r} takes {kinds}, but is given the predicted and the true next tokens, as integers "
            "named predictions and references; take one that does, such as accuracy."
        )
    return metric
