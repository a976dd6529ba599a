"""Metrics match scikit-learn."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from alexnet_pl.data.loaders import IGNORE_INDEX
from alexnet_pl.training.classifier import ClassificationMetrics


@pytest.mark.parametrize("classes", [3, 10])
def test_metrics_match_scikit_learn_and_ignore_padding(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, classes, generator=generator)
    labels = torch.randint(classes, (70,), generator=generator)
    top_k = min(5, classes)
    metrics = ClassificationMetrics(top_k)
    padding = torch.full((10,), IGNORE_INDEX)
    for batch, targets in zip(logits.split(35), labels.split(35), strict=True):
        batch, targets = torch.cat([batch, batch[:10]]), torch.cat([targets, padding])
        metrics.update(batch, targets, F.cross_entropy(batch, targets, reduction="none"))
    found = {name: float(value) for name, value in metrics.compute().items()}
    probabilities = logits.double().softmax(1)
    acc = accuracy_score(labels, logits.argmax(1))
    top5 = top_k_accuracy_score(labels, probabilities, k=top_k, labels=range(classes)) if top_k < classes else 1.0
    expected = {"loss": log_loss(labels, probabilities, labels=range(classes)), "acc": acc, "acc_top5": top5}
    assert found == pytest.approx({**expected, "error": 1 - acc, "error_top5": 1 - top5}, rel=1e-5)
