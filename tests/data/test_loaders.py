"""Batches, their order, and resuming inside an epoch."""

import pytest
import torch

from alexnet_pl.data.loaders import IGNORE_INDEX, EpochShuffle, TensorLoader
from alexnet_pl.distributed.environment import World


def make_loader(count: int, batch_size: int, seed: int | None = None, **settings) -> TensorLoader:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    sampler = None if seed is None else EpochShuffle(count, seed)
    return TensorLoader(images, torch.arange(count), torch.arange(count), batch_size, sampler, **settings)


def labels_of(loader: TensorLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


def test_evaluation_sees_every_image_once_in_order():
    assert [label for label in labels_of(make_loader(10, 4)) if label != IGNORE_INDEX] == list(range(10))
    assert len(make_loader(10, 4)) == 3


def test_evaluation_batches_are_padded_to_one_size():
    assert [len(images) for images, _ in make_loader(10, 4)] == [4, 4, 4]
    assert labels_of(make_loader(10, 4))[-2:] == [IGNORE_INDEX, IGNORE_INDEX]
    assert labels_of(make_loader(3, 4)) == [0, 1, 2]  # a split smaller than one batch
    assert labels_of(make_loader(8, 4)) == [*range(8)]


def test_training_drops_the_incomplete_batch_unless_it_is_the_only_one():
    training = make_loader(10, 4, seed=1)
    assert [len(labels) for _, labels in training] == [4, 4]
    assert len(training) == 2
    assert sorted(labels_of(make_loader(3, 4, seed=1))) == [0, 1, 2]
    assert len(make_loader(3, 4, seed=1)) == 1


def test_images_stay_with_their_labels():
    for images, labels in make_loader(50, 8, seed=3):
        assert images[:, 0, 0, 0].tolist() == labels.tolist()


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        training = make_loader(100, 10, seed)
        training.sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # other draws must not matter
        return labels_of(training)

    assert order(1, 0) == order(1, 0)
    assert order(1, 3) == order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert sorted(order(0, 0)) == list(range(100))


# --- resuming inside an epoch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_epoch_resumes_at_any_batch(done):
    whole = labels_of(make_loader(50, 8, seed=2))
    resumed = make_loader(50, 8, seed=2)
    resumed.start_image = resumed.images_before(done)
    assert (resumed.start_image, resumed.start_batch) == (8 * done, done)
    assert labels_of(resumed) == whole[8 * done :]
    assert resumed.start_batch == 0  # the next epoch is whole
    assert len(labels_of(resumed)) == 48


@pytest.mark.parametrize(("before", "after", "done"), [(4, 16, 5), (16, 4, 3), (8, 6, 2), (2, 32, 1)])
def test_batch_size_may_change_inside_an_epoch(before, after, done):
    """The resumed run continues at the next image of the same order and drops less than one batch at its end."""
    order = EpochShuffle(100, 2).order().tolist()
    stopped, resumed = make_loader(100, before, seed=2), make_loader(100, after, seed=2)
    next(iter(stopped))
    resumed.start_image = stopped.images_before(done)
    first_batch = resumed.start_batch
    seen = labels_of(resumed)
    assert seen == order[before * done :][: len(seen)]
    assert 100 - before * done - len(seen) < after
    assert first_batch + len(seen) // after == len(resumed)
    # Stopped again inside the same epoch, at its last batch.
    assert resumed.images_before(len(resumed)) == before * done + len(seen)


def test_at_least_one_batch_is_left():
    """Batches of 4 up to image 96 of 100, then batches of 32: the last 32 images, of which 28 are seen twice."""
    loader = make_loader(100, 32, seed=2)
    loader.start_image = 96
    assert loader.start_batch == len(loader) - 1
    assert labels_of(loader) == EpochShuffle(100, 2).order().tolist()[68:]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_resume_at_the_same_image(size):
    alone = make_loader(100, 8, seed=1)
    ranks = [make_loader(100, 8, seed=1, group=World(rank, size)) for rank in range(size)]
    for loader in (alone, *ranks):
        loader.start_image = 20
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
