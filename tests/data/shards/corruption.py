"""Helpers of the shard tests: loading and reading images back, damaging a file, waiting for threads."""

import io
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alexnet_pl.data.shards.datamodule import StreamLoader
from alexnet_pl.data.shards.reader import Shards


def stored(shards: Shards, split: str = "train") -> list[tuple[np.ndarray, int]]:
    """Return the pixels and the label of each image of a split."""
    found = shards.splits[split]
    images = shards.read(split, range(len(found.label)))
    return [
        (np.asarray(Image.open(io.BytesIO(content))), label) for content, label in zip(images, found.label, strict=True)
    ]


def flip(path: Path) -> None:
    """Invert one byte of a file, inside of its first image."""
    content = bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(content)


def make_loader(shards: Shards, **settings) -> StreamLoader:
    """Return a loader of all training images."""
    indices = torch.arange(len(shards.splits["train"].label))
    return StreamLoader(shards, "train", indices, **{"side": 16, "workers": 2, "batch_size": 8, **settings})


def wait_for_threads() -> None:
    """Wait until the threads of an abandoned iteration have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith(("decode", "fetch")):
            thread.join(10)
