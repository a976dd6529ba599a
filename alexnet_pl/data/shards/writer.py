"""Making shards: every picture of a tree read, brought to size and checked once, by many threads, and restartable."""

import hashlib
import io
import json
import logging
import os
import shutil
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
from filelock import FileLock, Timeout
from PIL import Image

from alexnet_pl.data.class_folders import SPLITS, Listing
from alexnet_pl.data.image_io import central_square, read_image
from alexnet_pl.data.shards.reader import ARRAYS, COLUMNS, FORMAT, INDEX, UNFINISHED, file_state, has_size, load_arrays
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.files import sha256_of

log = logging.getLogger(__name__)


LOCK = ".shards.lock"

PER_SHARD = 4096
"""Pictures in a shard: about 100 MB of ImageNet at 256×256, large enough for an object store."""

_CHUNK = 32  # pictures that a thread is handed at a time

_ORDER_SEED = 0  # of the order in the shards, the same whoever makes them

_LISTED = 10  # unreadable pictures that an error names


@dataclass(frozen=True)
class Plan:
    """One shard to be: its name, its files in order with their labels, and what tells whether a finished one is it."""

    name: str
    split: str
    files: list[tuple[str, int]]
    digest: str


@dataclass
class Written:
    """What is known of a finished shard; kept beside it as JSON until the index is written."""

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
    """Write the pictures of ``listing`` into shards in ``out``, or what of them is missing there.

    Every picture is read, turned upright, brought to RGB, scaled so that its shorter side is ``side``, cut to the
    central square and stored as JPEG; a picture that is such a JPEG already is stored as it is. A shard is written
    under another name, read back, and renamed when its checksum holds. Killed and called again, it keeps finished
    shards whose pictures have not changed since.

    Args:
        side: in pixels.
        quality: of the JPEG files. Below 128 pixels colour is kept at full resolution, from there on at half.
        per_shard: pictures in a shard.
        skip_unreadable: leave out pictures that cannot be read instead of refusing.
        workers: threads that read and scale.
        wait: for another process that is writing there; else it is refused.
        check: finished shards too: their checksums, not only their sizes. Damaged ones are made again.
        allow: how a person allows to skip, for the message.

    Returns:
        The content of ``shards.json``.

    Raises:
        DataError: pictures that cannot be read, all of them counted and the first ones named; a folder that holds
            something else or is being written to; no space.
    """
    refuse_foreign(out, listing.root)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / LOCK, timeout=-1 if wait else 0):
            return _make(listing, out, side, quality, per_shard, skip_unreadable, workers, check, allow)
    except Timeout as error:
        raise DataError(f"{out} is being written by another process. Wait for it, or choose another folder.") from error
    except OSError as error:
        raise DataError(
            f"{error.filename or out} cannot be written: {error.strerror}. What is finished is kept: call it again."
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
    if found is not None:  # of another state of the tree, or damaged: what is still right need not be made again
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
        log.info(f"reading {sum(len(each.files) for each in missing):,} pictures once, into {out}")
        for written in _write_all(listing.root, out, missing, side, quality, skip, workers):
            unreadable += written.skipped
            done[written.name] = written
    if unreadable and not skip:
        raise _unreadable(unreadable, listing, allow)
    return _write_index(out, listing.class_names, side, quality, digest, [done[each.name] for each in plans])


def _unreadable(pictures: Sequence[Sequence[str]], listing: Listing, allow: str) -> DataError:
    lines = "\n".join(f"  {reason}" for _, reason in sorted(pictures)[:_LISTED])
    more = f"\n  and {len(pictures) - _LISTED:,} more" if len(pictures) > _LISTED else ""
    return DataError(
        f"{len(pictures):,} of {len(listing):,} pictures cannot be read:\n{lines}{more}\n"
        f"Replace or remove them; what is finished is kept. {allow} leaves them out."
    )


def refuse_foreign(out: Path, root: Path) -> None:
    """Refuse a folder to write shards to that holds something else, or is part of the tree itself.

    Raises:
        DataError: says which.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Give a folder for the shards.")
    inside = [split for split in SPLITS if out.resolve().is_relative_to((root / split).resolve())]
    if inside or out.resolve() == root.resolve():
        raise DataError(f"{out} is a folder of the pictures themselves. Give another one for the shards.")
    ours = own_index(out) is not None or (out / ARRAYS).exists() or (out / UNFINISHED).is_dir()
    if out.is_dir() and not ours and any(path.name != LOCK for path in out.iterdir()):
        raise DataError(f"{out} holds something else. Give an empty or a new folder for the shards.")


def plan(listing: Listing, side: int, quality: int, per_shard: int = PER_SHARD) -> list[Plan]:
    """Which picture goes into which shard: a function of the names alone."""
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
    """The index of shards that lie in ``out``; None where there is none, or one of something else."""
    found = _read_json(out / INDEX)
    return found if found is not None and {"format", "splits", "digest", "arrays_sha256"} <= found.keys() else None


def _shards(index: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in index["splits"].values() for shard in split["shards"]]


def _finished(out: Path, wanted: Plan) -> Written | None:
    """What is known of a shard that is finished, unchanged and undamaged."""
    noted = _read_json(out / UNFINISHED / f"{wanted.name}.json")
    if noted is None or noted.get("digest") != wanted.digest:
        return None
    written = Written(**noted)
    if not (out / wanted.name).is_file():
        return None
    if not has_size(out / wanted.name, written.bytes) or sha256_of(out / wanted.name) != written.sha256:
        log.warning(f"warning: {out / wanted.name} is damaged, and made again")
        return None
    return written


def _to_unfinished(out: Path, index: dict[str, Any]) -> None:
    """Take an index apart again into what is known of each shard."""
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
            _write_json(
                out / UNFINISHED / f"{shard['name']}.json", {**known, "split": split, **columns, "skipped": skipped}
            )


def _write_all(
    root: Path, out: Path, plans: Sequence[Plan], side: int, quality: int, skip: bool, workers: int
) -> Iterator[Written]:
    """Write shards one after the other; workers read ahead, beyond the end of a shard too."""
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    on_terminal = get_console().is_terminal
    with Progress(*columns, transient=True, disable=not on_terminal) as bar, _threads(workers) as pool:
        task = bar.add_task("pictures", total=sum(len(each.files) for each in plans))
        jobs = ([str(root / path) for path, _ in each.files[start : start + _CHUNK]]
                for each in plans for start in range(0, len(each.files), _CHUNK))  # fmt: skip
        results = _in_order(pool, jobs, side, quality, ahead=4 * workers)
        encoded = (picture for chunk in results for picture in chunk)
        for each in plans:
            yield _write_shard(out, each, encoded, skip, lambda: bar.advance(task))


def _write_shard(
    out: Path, wanted: Plan, encoded: Iterator[bytes | str], skip: bool, advance: Callable[[], None]
) -> Written:
    """Write one shard whole, or not at all: with unreadable pictures that may not be skipped nothing is kept."""
    written = Written(wanted.name, wanted.split, wanted.digest)
    digest, part = hashlib.sha256(), out / UNFINISHED / f"{wanted.name}.part"
    try:
        with part.open("wb") as file:

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)
                written.bytes += len(data)

            for number, (path, label) in enumerate(wanted.files):
                picture = next(encoded)
                advance()
                if isinstance(picture, str):
                    written.skipped.append((path, picture))
                    continue
                key = _key(path, number)
                write(_header(f"{key}.jpg", len(picture)))
                written.offset.append(written.bytes)
                written.size.append(len(picture))
                written.label.append(label)
                written.crc32.append(zlib.crc32(picture))
                write(picture + _padding(len(picture)))
                text = str(label).encode()
                write(_header(f"{key}.cls", len(text)) + text + _padding(len(text)))
            write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        written.sha256 = digest.hexdigest()
        if written.skipped and not skip:
            return written
        if sha256_of(part) != written.sha256:
            raise DataError(f"{part} reads back other than it was written: the disk is failing.")
        # Noted first: a shard that is there without its note would be made again, never used unchecked.
        _write_json(out / UNFINISHED / f"{wanted.name}.json", vars(written))
        os.replace(part, out / wanted.name)
    finally:
        part.unlink(missing_ok=True)
    return written


def _key(path: str, number: int) -> str:
    """Such as ``cat/00000017-tabby``: what a WebDataset key may be, with no dot after the folder."""
    folders, name = os.path.split(path)
    return f"{folders.split(os.sep)[1]}/{number:08}-{os.path.splitext(name)[0].replace('.', '_')}"


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
    """The two index files, ``shards.json`` last, then away with what the making needed."""
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
                raise DataError(f"{split}/{class_names[absent[0]]} has no picture that can be read.")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _replace(out / ARRAYS, buffer.getvalue())
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
    _write_json(out / INDEX, index)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    if skipped:
        log.warning(f"warning: {len(skipped):,} pictures that cannot be read were left out; {out / INDEX} names them")
    return json.loads(json.dumps(index))


def _write_json(path: Path, content: Any) -> None:
    _replace(path, json.dumps(content).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The content, or None where there is none or a damaged one."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


# --- pictures to JPEG -------------------------------------------------------------------------------------------


def encode(path: str, side: int, quality: int) -> bytes | str:
    """A picture file as a JPEG file of ``side``×``side``; or why it cannot be read, one line with its name."""
    try:
        picture = read_image(path)
        if picture.size == (side, side) and (content := _ready_jpeg(path)):
            return content
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    file = io.BytesIO()
    central_square(picture, side).save(file, "JPEG", quality=quality, subsampling=0 if side < 128 else 2)
    return file.getvalue()


def _ready_jpeg(path: str) -> bytes | None:
    """The file itself where it is a JPEG in colour that nothing has to be done to: it loses nothing then."""
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        upright = picture.getexif().get(0x0112, 1) == 1
        return content if picture.format == "JPEG" and picture.mode == "RGB" and upright else None


def _encode_many(paths: Sequence[str], side: int, quality: int) -> list[bytes | str]:
    return [encode(path, side, quality) for path in paths]


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Pillow reads and scales without Python's lock: about nine threads are busy at a time, and nothing is copied."""
    pool = ThreadPoolExecutor(count, "encode")
    try:
        yield pool
    finally:  # after a signal or an error: what is under way ends, nothing new begins
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Sequence[str]], side: int, quality: int, ahead: int
) -> Iterator[list[bytes | str]]:
    """Results in the order of the jobs, with at most ``ahead`` of them under way, to bound the memory."""
    waiting: deque[Future] = deque()
    for job in jobs:
        waiting.append(pool.submit(_encode_many, job, side, quality))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
