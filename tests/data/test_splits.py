"""The stratified train/validation split."""

from hashlib import md5

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from alexnet_pl.data.splits import stratified_split
from alexnet_pl.runtime.errors import ConfigError, DataError

from .modules import data_module

CIFAR10_LABELS = np.repeat(np.arange(10), 5000)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_cifar10_splits_into_45000_and_500_per_class(order):
    labels = CIFAR10_LABELS if order == "sorted" else np.random.default_rng(0).permutation(CIFAR10_LABELS)
    train, val = stratified_split(labels, 0.1, seed=0)
    assert (len(train), len(val)) == (45_000, 5_000)
    assert np.bincount(labels[val]).tolist() == [500] * 10
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(50_000))


def test_split_depends_on_its_seed_alone_and_never_changes():
    first, again, other = (stratified_split(CIFAR10_LABELS, 0.1, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # The same images on every machine and in every version, so that studies across them compare like with like.
    assert md5(first.astype("<i8").tobytes()).hexdigest() == "497630b93af286ee920df5e24c1583c1"


@pytest.mark.parametrize("seed", range(20))
def test_split_is_that_of_scikit_learn_on_unequal_classes_with_tied_remainders(seed):
    generator = np.random.default_rng(seed)
    classes = int(generator.integers(2, 30))
    labels = generator.permutation(np.repeat(np.arange(classes), generator.integers(10, 30, classes)))
    held_out = float(generator.choice([0.1, 0.2, 1 / 3, 0.5]))
    expected = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=seed)
    for found, indices in zip(stratified_split(labels, held_out, seed), expected, strict=True):
        assert np.array_equal(found, np.sort(indices))


def test_split_ignores_the_training_seed():
    indices = {
        (seed, split_seed): data_module(f"seed={seed}", f"split_seed={split_seed}").val_dataloader().indices.tolist()
        for seed, split_seed in [(1, 0), (2, 0), (1, 5)]
    }
    assert indices[1, 0] == indices[2, 0] != indices[1, 5]


def test_fraction_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"data.val_fraction=1.0 is invalid: expected a number above 0 and below 1\."):
        stratified_split(CIFAR10_LABELS, 1.0, seed=0)


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        (np.repeat(np.arange(10), 2), 0.1, r"data.val_fraction=0.1 is invalid for 20 images in 10 classes, the "
         r"smallest of 2: expected .*, and the sides would have 18 and 2 images. Use a value from 0.5 to 0.5\."),
        (np.repeat(np.arange(10), 20), 0.04, "192 and 8 images. Use a value from 0.05 to 0.95"),
        (np.repeat(np.arange(10), 20), 0.96, "8 and 192 images. Use a value from 0.05 to 0.95"),
        (np.array([0, 0, 0, 0, 0, 1]), 0.5, "the smallest of 1: expected .* Add images"),
    ],
)  # fmt: skip
def test_fraction_that_leaves_a_class_out_is_refused_in_our_words(labels, fraction, message):
    with pytest.raises(DataError, match=message) as refusal:
        stratified_split(labels, fraction, seed=0)
    assert "test_size" not in str(refusal.value)  # scikit-learn's word
    assert "\n" not in str(refusal.value)


def test_advised_fractions_work():
    for fraction in (0.05, 0.95):
        train, val = stratified_split(np.repeat(np.arange(10), 20), fraction, seed=0)
        assert min(len(train), len(val)) == 10
