"""Shard writer: reads, resizes and checks every image of a dataset once, in parallel, and resumes after a kill."""

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_pl.data.class_folders import SPLITS, Listing
from alexnet_pl.data.image_io import central_square, exif_orientation, ignored_warnings, read_image
from alexnet_pl.data.shards.reader import (
    ARRAYS,
    COLUMNS,
    FORMAT,
    INDEX,
    MAX_ENCODED,
    MAX_SIDE,
    UNFINISHED,
    has_size,
    index_error,
    load_arrays,
)
from alexnet_pl.runtime.errors import DataError, os_reason, printable
from alexnet_pl.runtime.files import InUseError, exclusive_lock, file_state, sha256_of, write_atomic
from alexnet_pl.runtime.signals import deferred_signals

log = logging.getLogger(__name__)


LOCK = ".shards.lock"

PER_SHARD = 4096
"""Images per shard: about 100 MB of ImageNet at 256×256, a good object size for an object store."""

_CHUNK = 32  # images per task of a thread

_ORDER_SEED = 0  # of the order inside the shards, the same for everyone

_LISTED = 10  # unreadable images that an error names


@dataclass(frozen=True)
class Plan:
    """A shard to write: its name, its files in order with their labels, and a digest that identifies a finished one."""

    name: str
    split: str
    files: list[tuple[str, int]]
    digest: str


@dataclass
class Written:
    """Contents of a finished shard, stored next to it as JSON until the index is written."""

    name: str
    split: str
    digest: str
    sha256: str = ""
    bytes: int = 0
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def make_shards(
    listing: Listing,
    out: Path,
    side: int,
    quality: int = 95,
    *,
    per_shard: int = PER_SHARD,
    skip_unreadable: bool = False,
    workers: int = 1,
    wait: bool = False,
    check: bool = False,
    allow: str = "--skip-unreadable",
) -> dict[str, Any]:
    """Write the images of ``listing`` into shards in ``out``, or those that are missing there.

    Every image is decoded, rotated upright, converted to RGB, scaled so that its shorter side is ``side``, cropped to
    the central square, and stored as JPEG. An image that is such a JPEG already is stored unchanged. Each shard is
    written under a temporary name, read back, and renamed if its checksum matches. After a kill, the same call keeps
    finished shards whose images have not changed.

    Args:
        side: in pixels, 1 to ``MAX_SIDE``.
        quality: JPEG quality. Below 128 pixels, color is stored at full resolution, from there on at half.
        per_shard: images per shard.
        skip_unreadable: skip corrupt images instead of refusing them.
        workers: threads that decode and scale.
        wait: wait for another process that is writing to ``out`` instead of raising.
        check: verify checksums of finished shards, not only sizes, and write corrupt ones again.
        allow: option that skips corrupt images, for the message.

    Returns:
        The content of ``shards.json``.

    Raises:
        DataError: images are corrupt (all are counted, the first ones named), ``out`` holds something else or is in
            use, or the disk is full.
    """
    if not 1 <= side <= MAX_SIDE:
        raise DataError(f"{side} pixels a side is invalid: expected 1 to {MAX_SIDE:,}.")
    refuse_foreign(out, listing.root)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out / LOCK, wait):
            return _make(listing, out, side, quality, per_shard, skip_unreadable, workers, check, allow)
    except InUseError as error:
        raise DataError(f"{out} is in use by another process. Wait for it, or choose another directory.") from error
    except OSError as error:
        raise DataError(
            f"{error.filename or out} cannot be written: {os_reason(error)}. Finished shards are kept. Make room or "
            "choose another directory (data.shards=DIR), then run the command again."
        ) from error


def _make(
    listing: Listing,
    out: Path,
    side: int,
    quality: int,
    per_shard: int,
    skip: bool,
    workers: int,
    check: bool,
    allow: str,
) -> dict[str, Any]:
    plans = plan(listing, side, quality, per_shard)
    digest = hashlib.sha256("".join(each.digest for each in plans).encode()).hexdigest()
    found = own_index(out)
    if found is not None and found.get("digest") == digest:
        if found["skipped"] and not skip:
            raise _unreadable(found["skipped"], listing, allow)
        intact = _is_intact if check else _has_its_size
        arrays = {"name": ARRAYS, "bytes": found["arrays_bytes"], "sha256": found["arrays_sha256"]}
        if all(intact(out, shard) for shard in (arrays, *_shards(found))):
            return found
    unfinished = out / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    if found is not None:  # outdated or corrupt: shards that are still right are kept
        _to_unfinished(out, found)
        (out / INDEX).unlink(missing_ok=True)
    for part in unfinished.glob("*.part"):
        part.unlink()
    done = {each.name: kept for each in plans if (kept := _finished(out, each)) and (skip or not kept.skipped)}
    missing = [each for each in plans if each.name not in done]
    unreadable: list[tuple[str, str]] = []
    if done and missing:
        log.info(f"{len(done):,} of {len(plans):,} shards in {out} are finished already")
    if missing:
        log.info(f"reading {sum(len(each.files) for each in missing):,} images once, into {out}")
        for written in _write_all(listing.root, out, missing, side, quality, skip, workers):
            unreadable += written.skipped
            done[written.name] = written
    if unreadable and not skip:
        raise _unreadable(unreadable, listing, allow)
    return _write_index(out, listing.class_names, side, quality, digest, [done[each.name] for each in plans])


def _unreadable(images: Sequence[Sequence[str]], listing: Listing, allow: str) -> DataError:
    lines = "\n".join(f"  {printable(reason)}" for _, reason in sorted(map(tuple, images))[:_LISTED])
    more = f"\n  and {len(images) - _LISTED:,} more" if len(images) > _LISTED else ""
    return DataError(
        f"{len(images):,} of {len(listing):,} images cannot be read:\n{lines}{more}\n"
        "Replace them: finished shards are kept. If images are removed or added, their split is converted again. "
        f"Or skip them with {allow}."
    )


def refuse_foreign(out: Path, root: Path) -> None:
    """Refuse an output directory that holds something else or is part of the dataset.

    Raises:
        DataError: names the problem.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Give a directory for the shards.")
    inside = [split for split in SPLITS if out.resolve().is_relative_to((root / split).resolve())]
    if inside or out.resolve() == root.resolve():
        raise DataError(f"{out} is a directory of the images themselves. Give another one for the shards.")
    ours = own_index(out) is not None or (out / ARRAYS).exists() or (out / UNFINISHED).is_dir()
    if out.is_dir() and not ours and any(path.name != LOCK for path in out.iterdir()):
        raise DataError(f"{out} holds something else. Give an empty or a new directory for the shards.")


def plan(listing: Listing, side: int, quality: int, per_shard: int = PER_SHARD) -> list[Plan]:
    """Assign images to shards, as a function of their names alone."""
    plans = []
    for split, files in listing.files.items():
        order = np.random.default_rng(_ORDER_SEED).permutation(len(files))
        for number, start in enumerate(range(0, len(files), per_shard)):
            chosen = [files[index] for index in order[start : start + per_shard]]
            digest = hashlib.sha256(f"{FORMAT} {side} {quality}\n".encode())
            for path, label in chosen:
                size, changed = file_state(listing.root / path)
                digest.update(f"{path}|{label}|{size}|{changed}\n".encode(errors="surrogateescape"))
            plans.append(Plan(f"{split}-{number:05}.tar", split, chosen, digest.hexdigest()))
    return plans


def _has_its_size(out: Path, shard: dict[str, Any]) -> bool:
    return has_size(out / shard["name"], shard["bytes"])


def _is_intact(out: Path, shard: dict[str, Any]) -> bool:
    return _has_its_size(out, shard) and sha256_of(out / shard["name"]) == shard["sha256"]


def own_index(out: Path) -> dict[str, Any] | None:
    """Return the index of the shards in ``out``, or None if it is absent, invalid or of another program."""
    found = _read_json(out / INDEX)
    if found is None or not {"format", "digest", "arrays_bytes"} <= found.keys() or index_error(found):
        return None
    return found


def _shards(index: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in index["splits"].values() for shard in split["shards"]]


def _finished(out: Path, wanted: Plan) -> Written | None:
    """Return the record of a shard that is finished, unchanged and intact; else None."""
    noted = _read_json(out / UNFINISHED / f"{wanted.name}.json")
    if noted is None or noted.get("digest") != wanted.digest:
        return None
    try:
        written = Written(**noted)
    except TypeError:
        return None
    if not (out / wanted.name).is_file():
        return None
    if not has_size(out / wanted.name, written.bytes) or sha256_of(out / wanted.name) != written.sha256:
        log.warning(f"warning: {out / wanted.name} is corrupt and will be written again")
        return None
    return written


def _to_unfinished(out: Path, index: dict[str, Any]) -> None:
    """Split an index back into one record per shard."""
    try:
        arrays = load_arrays((out / ARRAYS).read_bytes())
    except (OSError, DataError):
        return
    for split, described in index["splits"].items():
        start = 0
        for shard in described["shards"]:
            part = slice(start, start := start + shard["images"])
            columns = {name: arrays[f"{split}_{name}"][part].tolist() for name in COLUMNS}
            skipped = [entry for entry in index["skipped"] if entry[0] in shard["skipped"]]
            known = {name: shard[name] for name in ("name", "digest", "sha256", "bytes")}
            record = {**known, "split": split, **columns, "skipped": skipped}
            write_atomic(out / UNFINISHED / f"{shard['name']}.json", json.dumps(record))


def _write_all(
    root: Path, out: Path, plans: Sequence[Plan], side: int, quality: int, skip: bool, workers: int
) -> Iterator[Written]:
    """Write shards one after another, while threads decode ahead, also across the end of a shard."""
    from rich import get_console  # here for start-up time: most runs write no shards
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    on_terminal = get_console().is_terminal and sys.stdout.isatty()  # the first is also true with FORCE_COLOR
    with (
        Progress(*columns, transient=True, disable=not on_terminal) as bar,
        deferred_signals() as handle_signals,
        _threads(workers) as pool,
    ):
        task = bar.add_task("images", total=sum(len(each.files) for each in plans))
        jobs = ([str(root / path) for path, _ in each.files[start : start + _CHUNK]]
                for each in plans for start in range(0, len(each.files), _CHUNK))  # fmt: skip
        results = _in_order(pool, jobs, side, quality, ahead=4 * workers)
        encoded = (image for chunk in results for image in chunk)

        def advance() -> None:
            handle_signals()
            bar.advance(task)

        for each in plans:
            yield _write_shard(out, each, encoded, skip, advance)


def _write_shard(
    out: Path, wanted: Plan, encoded: Iterator[bytes | str], skip: bool, advance: Callable[[], None]
) -> Written:
    """Write one shard, whole or not at all. Nothing is kept if it has corrupt images that may not be skipped."""
    written = Written(wanted.name, wanted.split, wanted.digest)
    digest, part = hashlib.sha256(), out / UNFINISHED / f"{wanted.name}.part"
    try:
        with part.open("wb") as file:

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)
                written.bytes += len(data)

            for number, (path, label) in enumerate(wanted.files):
                image = next(encoded)
                advance()
                if isinstance(image, str):
                    written.skipped.append((path, image))
                    continue
                key = _key(path, number)
                write(_header(f"{key}.jpg", len(image)))
                written.offset.append(written.bytes)
                written.size.append(len(image))
                written.label.append(label)
                written.crc32.append(zlib.crc32(image))
                write(image + _padding(len(image)))
                text = str(label).encode()
                write(_header(f"{key}.cls", len(text)) + text + _padding(len(text)))
            write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        written.sha256 = digest.hexdigest()
        if written.skipped and not skip:
            return written
        if sha256_of(part) != written.sha256:
            raise DataError(f"{part} does not read back as written: the disk is failing.")
        # The record first: a shard without one is written again, never used unchecked.
        write_atomic(out / UNFINISHED / f"{wanted.name}.json", json.dumps(vars(written)))
        os.replace(part, out / wanted.name)
    finally:
        part.unlink(missing_ok=True)
    return written


def _key(path: str, number: int) -> str:
    """Return a WebDataset key such as ``cat/00000017-tabby``, without dots after the directory."""
    directories, name = os.path.split(path)
    return f"{directories.split(os.sep)[1]}/{number:08}-{os.path.splitext(name)[0].replace('.', '_')}"


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


_DTYPES = (np.uint64, np.uint32, np.int32, np.uint32)


def _write_index(
    out: Path, class_names: Sequence[str], side: int, quality: int, digest: str, shards: Sequence[Written]
) -> dict[str, Any]:
    """Write the two index files, ``shards.json`` last, then remove the records and outdated shards."""
    splits: dict[str, Any] = {}
    arrays = {}
    for split in SPLITS:
        if own := [shard for shard in shards if shard.split == split]:
            listed = [
                {"name": shard.name, "images": len(shard.size), "bytes": shard.bytes, "sha256": shard.sha256,
                 "digest": shard.digest, "skipped": [path for path, _ in shard.skipped]}
                for shard in own
            ]  # fmt: skip
            splits[split] = {"images": sum(shard["images"] for shard in listed), "shards": listed}
            for name, dtype in zip(COLUMNS, _DTYPES, strict=True):
                arrays[f"{split}_{name}"] = np.concatenate([np.array(getattr(shard, name), dtype) for shard in own])
            absent = np.setdiff1d(np.arange(len(class_names)), arrays[f"{split}_label"])
            if len(absent):
                raise DataError(f"{split}/{class_names[absent[0]]} has no image that can be read.")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes keywords for allow_pickle
    write_atomic(out / ARRAYS, buffer.getvalue())
    skipped = [entry for shard in shards for entry in shard.skipped]
    index = {
        "format": FORMAT, "side": side, "quality": quality, "class_names": list(class_names), "digest": digest,
        "splits": splits, "skipped": skipped, "arrays_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "arrays_bytes": len(buffer.getvalue()),
    }  # fmt: skip
    current = {shard.name for shard in shards}
    for stale in out.glob("*-?????.tar"):
        if stale.name.partition("-")[0] in SPLITS and stale.name not in current:
            stale.unlink()
    write_atomic(out / INDEX, json.dumps(index))
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    if skipped:
        log.warning(f"warning: {len(skipped):,} unreadable images were skipped; {out / INDEX} names them")
    written: dict[str, Any] = json.loads(json.dumps(index))  # as read_json returns it: lists instead of tuples
    return written


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if it is absent or corrupt."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
        return found if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


# --- images to JPEG -------------------------------------------------------------------------------------------------


def encode(path: str, side: int, quality: int) -> bytes | str:
    """Return an image file as a JPEG file of ``side``×``side``, or one line that says why it cannot be read."""
    try:
        image = read_image(path)
        if image.size == (side, side) and (content := _ready_jpeg(path)):
            return content
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    file = io.BytesIO()
    central_square(image, side).save(file, "JPEG", quality=quality, subsampling=0 if side < 128 else 2)
    return file.getvalue()


def _ready_jpeg(path: str) -> bytes | None:
    """Return the file unchanged if it is an upright RGB JPEG, which avoids a second lossy compression; else None."""
    if Path(path).stat().st_size > MAX_ENCODED:
        return None
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        is_upright = exif_orientation(image) == 1
        return content if image.format == "JPEG" and image.mode == "RGB" and is_upright else None


def _encode_many(paths: Sequence[str], side: int, quality: int) -> list[bytes | str]:
    return [encode(path, side, quality) for path in paths]


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool. Pillow decodes and scales without the GIL, so about nine threads are busy at a time."""
    pool = ThreadPoolExecutor(count, "encode")
    with ignored_warnings():  # here, because the threads must not change the filters
        try:
            yield pool
        finally:  # after a signal or an error, running tasks finish and no new ones start
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Sequence[str]], side: int, quality: int, ahead: int
) -> Iterator[list[bytes | str]]:
    """Yield results in the order of the jobs, with at most ``ahead`` in flight, which bounds the memory."""
    waiting: deque[Future[list[bytes | str]]] = deque()
    for job in jobs:
        waiting.append(pool.submit(_encode_many, job, side, quality))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
