"""Objectives of training: label smoothing and soft labels against torch and formulas; the metrics stay plain."""

import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT_RUN, config, metric_rows
from torch import nn

from alexnet_pl.config.validate import validate
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.classifier import ImageClassifier, average_views, pad_classes
from alexnet_pl.training.run import run


def classifier(loss: nn.Module | None = None) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), 7, torch.optim.SGD, loss=loss)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 3, 2, 2, generator=generator), torch.randint(7, (9,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_mixes_in_the_uniform_distribution(smoothing):
    model = classifier(nn.CrossEntropyLoss(label_smoothing=smoothing))
    images, labels = batch()
    objective = model.training_step((images, labels), 0).detach()
    log_p = model(images).detach().double().log_softmax(1)
    expected = -(1 - smoothing) * log_p[range(9), labels] - smoothing * log_p.mean(1)
    assert float(objective) == pytest.approx(float(expected.mean()), rel=1e-6)
    plain = classifier()
    plain.training_step((images, labels), 0)
    assert model.train_metrics.compute() == plain.train_metrics.compute()


def test_without_smoothing_the_objective_is_the_metric_bit_for_bit():
    objectives = [classifier(loss).training_step(batch(), 0) for loss in (None, nn.CrossEntropyLoss())]
    assert torch.equal(*objectives)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(weight=torch.tensor([0.01, 1, 1, 1, 1, 1, 2])), nn.CrossEntropyLoss(ignore_index=3)]
)
def test_settings_of_the_loss_are_not_ignored(loss):
    images, labels = batch()
    model = classifier(loss)
    objective = model.training_step((images, labels), 0).detach()
    expected = loss(model(images), labels).detach()
    assert float(objective) == pytest.approx(float(expected))
    assert float(objective) != pytest.approx(float(F.cross_entropy(model(images).detach(), labels)))


def test_mixed_labels_exclude_a_class_that_is_ignored(tmp_path):
    """Issue: torch's refusal came with the first batch, as a traceback."""
    with pytest.raises(ConfigError, match="loss.ignore_index=0 is invalid: expected no such key with mixup or cutmix"):
        run(config(*SHORT_RUN, "augment=mixup", "+loss.ignore_index=0", run_dir=tmp_path / "run"))


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_soft_labels_go_through_loss_and_metrics(loss):
    model = classifier(loss)
    images, labels = batch()
    soft = 0.7 * F.one_hot(labels, 7) + 0.3 * F.one_hot(labels.roll(1), 7)
    objective = model.training_step((images, soft), 0).detach()
    log_p = model(images).detach().log_softmax(1)
    smoothing = 0.0 if loss is None else 0.1
    target = (1 - smoothing) * soft + smoothing / 7
    assert float(objective) == pytest.approx(float(-(target * log_p).sum(1).mean()), rel=1e-5)
    found = model.train_metrics.compute()
    assert float(found["loss"]) == pytest.approx(float(-(soft * log_p).sum(1).mean()), rel=1e-5)
    assert float(found["acc"]) == pytest.approx(float((log_p.argmax(1) == labels).float().mean()))


def test_soft_labels_of_fewer_classes_than_logits():
    logits, soft = torch.randn(2, 5), torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    padded = pad_classes(soft, logits)
    assert torch.equal(padded, F.pad(soft, (0, 2)))
    hard = torch.tensor([1, 0])
    assert pad_classes(hard, logits) is hard


def test_six_views_have_the_weights_of_airbench():
    logits = torch.randn(6, 4, 5, dtype=torch.float64)
    p = logits.softmax(-1)
    expected = 0.5 * p[:2].mean(0) + 0.5 * p[2:].mean(0)
    assert torch.allclose(average_views(logits).exp(), expected)
    assert torch.allclose(average_views(logits[:2]).exp(), p[:2].mean(0))


def test_a_run_with_label_smoothing(tmp_path):
    for name, smoothing in (("plain", 0), ("smooth", 0.1)):
        run(config(*SHORT_RUN, f"loss.label_smoothing={smoothing}", run_dir=tmp_path / name))
    plain, smooth = (metric_rows(tmp_path / name) for name in ("plain", "smooth"))
    assert plain[0]["val/loss"] != smooth[0]["val/loss"]
    # Both start from the same weights, so plain cross-entropy is the same to within a few steps of training.
    assert float(plain[0]["val/loss"]) == pytest.approx(float(smooth[0]["val/loss"]), rel=0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.label_smoothing=1", "loss.label_smoothing=1 is invalid: expected a number from 0 to below 1"),
        ("loss.label_smoothing=-0.1", "loss.label_smoothing=-0.1 is invalid"),
        ("loss.label_smoothing=some", "loss.label_smoothing=some is invalid: expected a number"),
        ("+loss.reduction=sum", "loss.reduction=sum is invalid: expected mean"),
    ],
)
def test_invalid_losses_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        validate(config("model=lenet5", override))


def test_a_run_without_the_section_has_the_plain_loss():
    cfg = config("model=lenet5", "~loss")
    validate(cfg)
