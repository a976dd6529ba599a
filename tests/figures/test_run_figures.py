"""Figures of a run: predictions kept from the test, examples, and a reason for each unavailable figure."""

import pytest
import torch
from torch import nn

from alexnet_pl.data.transforms import normalize
from alexnet_pl.figures.run_figures import (
    DRAWN_BY,
    NUM_MISTAKES,
    SAMPLE_SIZE,
    FigureInputs,
    TestPredictions,
    draw,
    save,
    spread_over_classes,
)


def test_predictions_keep_the_worst_mistakes_and_a_uniform_sample():
    """Compared with the whole set at once; padding does not count, and the halves of two ranks are merged."""
    random = torch.Generator().manual_seed(1)
    count, mean, std = 1000, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=random)
    images[:, 0, 0, 0] = torch.arange(count) % 256
    labels, logits = torch.randint(0, 7, (count,), generator=random), torch.randn(count, 7, generator=random) * 3
    ranks = [TestPredictions(mean, std), TestPredictions(mean, std)]
    for index, part in enumerate(torch.arange(count).split(64)):
        padded = torch.cat([labels[part], torch.tensor([-100])])
        pick = torch.cat([part, part[:1]])
        ranks[index % 2].add(normalize(images[pick], mean, std), padded, logits[pick])
    predictions = ranks[0]
    predictions.merge(ranks[1])
    assert sorted(predictions.labels.tolist()) == sorted(labels.tolist())
    confidence, predicted = logits.softmax(1).max(1)
    wrong = confidence.where(predicted != labels, -1)
    worst = wrong.argsort(descending=True)[:NUM_MISTAKES]
    assert torch.equal(predictions.mistakes.images, images[worst])
    assert torch.equal(predictions.mistakes.labels, labels[worst])
    assert torch.allclose(predictions.mistakes.probabilities, logits[worst].softmax(1))
    assert len(predictions.sample.images) == SAMPLE_SIZE
    assert len(predictions.sample.images.flatten(1).unique(dim=0)) == SAMPLE_SIZE
    assert len(predictions.sample.labels.unique()) == 7


def test_examples_are_spread_over_the_classes():
    labels = torch.tensor([3, 3, 3, 1, 0, 1, 3, 0])
    assert spread_over_classes(labels, 5) == [0, 3, 4, 1, 5]
    assert spread_over_classes(labels, 50) == [0, 3, 4, 1, 5, 7, 2, 6]
    assert spread_over_classes(torch.empty(0), 5) == []


def figure_inputs(net: nn.Module, classes: int, logits: torch.Tensor | None = None) -> FigureInputs:
    predictions = TestPredictions((0.5,) * 3, (0.5,) * 3)
    predictions.add(
        torch.randn(20, 3, 8, 8), torch.arange(20) % classes, torch.randn(20, classes) if logits is None else logits
    )
    names = [f"class {index}" for index in range(classes)]
    return FigureInputs(net, names, predictions, missing={"features": "no features here"})


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_figures_of_any_number_of_classes(classes):
    drawn, unavailable = draw(figure_inputs(nn.Conv2d(3, 4, 3), classes))
    assert set(drawn) | set(unavailable) == set(DRAWN_BY)
    assert unavailable["nearest"] == "no features here"
    assert set(unavailable) == {"nearest", "augmented_batch"} | ({"mistakes"} if classes == 1 else set())


def test_every_unavailable_figure_has_a_reason():
    drawn, unavailable = draw(figure_inputs(nn.Linear(2, 2), 3, torch.full((20, 3), float("nan"))))
    assert unavailable["conv1_kernels"] == "the network has no convolution"
    assert {"confusion_matrix", "top5"} <= set(drawn)
    drawn, unavailable = draw(FigureInputs(nn.Conv2d(5, 4, 3), ["a"], missing={"test": "no data"}))
    assert drawn == {}
    assert unavailable["conv1_kernels"] == "the first convolution has 5 input channels, not 1 or 3"
    assert unavailable["confusion_matrix"] == unavailable["top5"] == "no data"


def test_figures_are_not_written_through_a_symbolic_link(tmp_path):
    """A stranger's archive could make ``figures`` point anywhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        save({"top5": b"png"}, tmp_path / "figures")
    assert not [*(tmp_path / "elsewhere").iterdir()]
