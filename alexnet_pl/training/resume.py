"""Resuming a run: its saved config, output paths, changed settings, and the position to continue from."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from alexnet_pl.config.rehearsal import check_side, rehearse
from alexnet_pl.config.schedules import RunLength, ScheduleFactory
from alexnet_pl.config.schema import accepted_arguments, locate
from alexnet_pl.config.trust import check_targets, walk
from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.data.shards.reader import is_url
from alexnet_pl.runtime.commands import hydra_override, shell_join
from alexnet_pl.runtime.errors import ConfigError, DataError, invalid_value, printable
from alexnet_pl.runtime.run_folder import CONFIG, check_entries, load_plain
from alexnet_pl.training.checkpoint_io import MAX_COUNT
from alexnet_pl.training.trackers import IDENTITIES, Tracker, read_identity

log = logging.getLogger(__name__)

CALL_KEYS = ("resume", "allow_changes", "run_dir", "study", "trust")
"""Keys that say how a run is called, not what it computes."""

OF_A_START = ("data_dir", "init_from")
"""Keys that say what a run starts from; an experiment beside ``resume`` leaves them as they were."""

PLACES = ("data.root",)
"""Keys that say where something lies: a resumed run uses their current values and is still the same run."""

KEEPING_THE_SPLIT = ("root", "shards", "cache", "workers", "batch_size", "seed", "augment", "mean", "std", "test_crops")
"""Keys of ``data`` that change neither which images form a split nor their order in it."""

OUTPUT_SECTIONS = ("callbacks", "logger", "trainer")
"""Sections whose paths are written to."""

PATH_WORDS = ("dir", "path", "folder", "file", "root", "uri", "url", "location", "cache", "dest", "output", "storage")
"""Parts of key names that denote paths, whatever type the constructor declares."""

ACCOUNT_WORDS = ("entity", "host", "server", "workspace", "team", "account", "endpoint", "api_key")
"""Parts of key names of loggers that denote a remote service or an account there."""


COPIES = (
    ("data.image_size", "model.image_size"),
    ("scheduler.max_lr", "optimizer.lr"),
    ("augment.*.fill", "data.mean"),
    ("augment.*.mean", "data.mean"),
    ("augment.*.size", "data.image_size"),
    ("data.seed", "seed"),
    ("data.split_seed", "split_seed"),
    ("data.augment", "augment"),
)
"""Keys that ``conf/`` sets from other keys, as pairs (pattern of the copy, source); a source comes before its copies.

In the config of a run both are plain values. A change of the source changes the copy as well."""


class _Absent:
    """Stands for the value of a key that one of two configs lacks."""

    def __str__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Key(str):
    """Dotted name of a config key; ``parts`` lead to it and may hold dots themselves, as in ``features.conv1``."""

    parts: tuple[Any, ...]

    @classmethod
    def of(cls, parts: tuple[Any, ...]) -> "Key":
        """Return the name of the key at the end of ``parts``."""
        key = cls(".".join(map(str, parts)))
        key.parts = parts
        return key


Changes = dict[str, tuple[Any, Any]]
"""Key → (value in the saved config, value now)."""


@dataclass(frozen=True)
class Position:
    """The position at which a run continues.

    Attributes:
        epoch: finished epochs.
        images: images of the current epoch's order that were used, whatever the batch size was.
        batch: batches of the current epoch that were used, at that batch size.
        step: optimizer steps taken.
    """

    epoch: int = 0
    images: int = 0
    batch: int = 0
    step: int = 0

    def __str__(self) -> str:
        if self.images:
            return f"continues inside epoch {self.epoch + 1}, after batch {self.batch}"
        return f"continues after epoch {self.epoch}"


START = Position()
"""The position of a new run."""


@dataclass(frozen=True)
class SavedLengths:
    """Lengths that a checkpoint records: of the run as planned then, and of the part of it that the schedule covers."""

    run: RunLength
    schedule: RunLength


def saved_config(run_dir: Path, now: DictConfig) -> DictConfig:
    """Load the config of the run to resume, with its paths adapted to where the directory is now.

    Paths that a run writes to are never read from the file: they are those of ``now`` or lie in ``run_dir``.

    Args:
        now: config composed from this command line.

    Raises:
        ConfigError: ``run_dir`` is not a run directory, or its config.yaml is corrupt, names a class that it may not
            name, or would write elsewhere.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"resume={run_dir} is not a run directory: {CONFIG} not found in it.")
    check_entries(run_dir)
    plain = load_plain(path)
    before = plain.get("run_dir")
    if not isinstance(before, str):
        raise ConfigError(f"{path} is corrupt: run_dir not found.")
    trust = now.get("trust") or ()
    check_targets(plain, trust)
    model, data = (plain.get(section) for section in ("model", "data"))
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise ConfigError(f"{path} is corrupt: model or data not found.")
    rehearse(model, data.get("image_size"), trust)
    if data.get("resize_size") is not None:
        check_side("data.resize_size", data["resize_size"])
    saved: DictConfig = OmegaConf.create(relocated(plain, before, str(run_dir)))
    derive_outputs(saved, now, run_dir)
    return saved


def relocated(node: Any, before: str, now: str) -> Any:
    """Return a plain config in which paths in the directory ``before`` are in ``now`` instead."""
    if isinstance(node, dict):
        return {key: relocated(value, before, now) for key, value in node.items()}
    if isinstance(node, list):
        return [relocated(value, before, now) for value in node]
    if isinstance(node, str) and (node == before or node.startswith(before + "/")):
        return now + node.removeprefix(before)
    return node


def derive_outputs(saved: DictConfig, now: DictConfig, run_dir: Path) -> None:
    """Replace the output paths of ``saved`` by those of ``now``; paths that only ``saved`` has must be in ``run_dir``.

    The caches of images and of the shards made from them are outputs as well.

    Raises:
        ConfigError: a path outside the run directory that this command line does not give, or positional arguments,
            which could be paths without a name to tell them by.
    """
    saved.run_dir, saved.trust = str(run_dir), list(now.get("trust") or ())
    for section in (*OUTPUT_SECTIONS, "data"):
        if positional := next((key for key, _ in _strings(saved.get(section), section) if "._args_[" in key), None):
            raise ConfigError(f"{positional} is refused: expected arguments by name in the config of a run directory.")
    for key in ("cache", "shards"):
        if saved.get("data") and key in saved.data:
            saved.data[key] = now.data.get(key) if now.get("data") else None
    leaves = {key: value for section in OUTPUT_SECTIONS for key, value in _strings(saved.get(section), section)}
    for key, value in leaves.items():
        is_account = key.startswith("logger.") and any(word in key.rpartition(".")[2].lower() for word in ACCOUNT_WORDS)
        if not (is_account or _is_path(key, value) or _declares_path(saved, key)):
            continue
        derived = OmegaConf.select(now, key)
        if isinstance(derived, str):
            OmegaConf.update(saved, key, derived)
        elif is_account:
            raise ConfigError(
                f"{key}={value} is refused: the config of a run directory may not choose where a run is logged. "
                f"If you trust it, give it on the command line: +{key}=…"
            )
        elif "://" in value or not Path(value).expanduser().resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(
                f"{key}={value} is refused: a resumed run writes to its own directory only. "
                f"If you trust the path, give it on the command line: +{key}=…"
            )


def _strings(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        name = f"{path}.{key}" if isinstance(node, dict) else f"{path}[{key}]"
        if isinstance(value, str):
            yield name, value
        else:
            yield from _strings(value, name)


def _is_path(key: str, value: str) -> bool:
    """Return True if a string may be a path: by the name of its key, or because it could leave a directory."""
    name = key.rpartition(".")[2].lower()
    if name == "_target_" or (name == "filename" and "/" not in value):
        return False
    leaves = value.startswith(("/", "~", ".")) or ".." in value.split("/") or ":" in value
    return leaves or any(word in name for word in PATH_WORDS)


def _declares_path(config: DictConfig, key: str) -> bool:
    """Return True if the constructor that gets the value at ``key`` declares it as a path, whatever its name."""
    parent, _, name = key.rpartition(".")
    owner = OmegaConf.select(config, parent)
    target = owner.get("_target_") if isinstance(owner, DictConfig) else None
    return target is not None and _is_path_type(accepted_arguments(locate(parent, target))[0].get(name))


def _is_path_type(annotation: Any) -> bool:
    if parts := get_args(annotation):
        return any(_is_path_type(part) for part in parts)
    return isinstance(annotation, type) and issubclass(annotation, os.PathLike)


def named_on_the_command_line() -> list[str]:
    """Return the keys and groups given beside ``resume``, such as ``optimizer.lr`` and ``model/norm``."""
    return named_settings(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def named_settings(overrides: Sequence[str]) -> list[str]:
    """Return the keys and groups that overrides set, without those that say how a run is called."""
    keys = [override.split("=", 1)[0].lstrip("+~") for override in overrides]
    return [key for key in keys if key not in CALL_KEYS]


def diff_configs(saved: DictConfig, now: DictConfig, named: Sequence[str]) -> Changes:
    """Return what the named settings would change in a run, with the ``COPIES`` of what they change.

    Args:
        saved: the run's config.
        now: config composed from the command line.
        named: keys or groups; a group covers all keys in it, ``experiment`` and ``rung`` cover every key.
    """
    before, target = _leaves(saved), _leaves(now)
    prefixes = [name.replace("/", ".") for name in named]
    everything = "experiment" in prefixes or "rung" in prefixes
    after = dict(before)
    for key in {*before, *target}:
        if key in CALL_KEYS or (key == "threads" and target.get(key) == "auto"):  # the run has chosen already
            continue
        is_named = any(_is_in(key, prefix) for prefix in prefixes)
        if is_named or (everything and key not in OF_A_START):
            _set(after, key, target.get(key, ABSENT))
    for pattern, source in COPIES:
        for key in sorted({pattern, *(key for key in after if fnmatchcase(key, pattern))}):
            # A copy that a named group covers is one if it is one in that group, any other if it was one in the run.
            reference = target if _part(before, key) != _part(after, key) else before
            is_copy = _part(reference, key) and _part(reference, key) == _part(reference, source)
            if is_copy and not any(_is_in(prefix, key) for prefix in prefixes):
                for rest in _part(after, key):
                    del after[key + rest]
                after |= {key + rest: value for rest, value in _part(after, source).items()}
    if before.get("data.image_size") != after.get("data.image_size"):
        after["model.image_size"] = after.get("data.image_size")
    return _differences(before, after)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Return the leaves in which two configs differ, by name. A new key that is null is no difference."""
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) or key not in after
    }


def _is_in(key: str, section: str) -> bool:
    """Return True if ``key`` is ``section`` or lies in it."""
    return key == section or key.startswith(f"{section}.")


def _part(leaves: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return ``{".lr": 0.001, …}``, the leaves in a section by the rest of their names; ``{"": value}`` of a leaf."""
    return {key.removeprefix(section): value for key, value in leaves.items() if _is_in(key, section)}


def _set(leaves: dict[str, Any], key: str, value: Any) -> None:
    if value is ABSENT:
        leaves.pop(key, None)
    else:
        leaves[key] = value


def _leaves(config: Any) -> dict[str, Any]:
    """Return ``{"optimizer.lr": 0.001, …}`` of a config or a plain dict; a list counts as one value."""
    found: dict[str, Any] = {}

    def visit(node: Any, parts: tuple[Any, ...]) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(value, (*parts, key))
        else:
            found[Key.of(parts)] = node

    visit(OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config, ())
    return found


def _parts(key: str) -> tuple[Any, ...]:
    return key.parts if isinstance(key, Key) else tuple(key.split("."))


def apply_path_changes(saved: DictConfig, changed: Changes) -> Changes:
    """Apply the changes of ``PLACES`` to ``saved`` and return the others."""
    moved = {key: now for key, (_, now) in changed.items() if key in PLACES and now is not ABSENT}
    for key, now in moved.items():
        OmegaConf.update(saved, key, now)
    return {key: change for key, change in changed.items() if key not in moved}


def apply_changes(saved: DictConfig, changed: Changes, allowed: bool) -> None:
    """Apply the changes to ``saved``. A section of which nothing is left is removed.

    Raises:
        ConfigError: changes that were not allowed, that make it another network, or that a run which has begun could
            not honor, with the keys.
    """
    listed = ", ".join(f"{key} ({before} → {now})" for key, (before, now) in changed.items())
    if changed and not allowed:
        raise ConfigError(
            f"resume would change {listed}.\nLeave them out to continue unchanged, or add allow_changes=true "
            "(a change of optimizer or scheduler restarts the learning-rate schedule)."
        )
    if "data_dir" in changed:
        raise ConfigError("data_dir is invalid beside resume. Give the current location of the data: ++data.root=DIR")
    # Whether the network takes another image size is seen when its weights are loaded.
    follows = {"model.image_size"} if "data.image_size" in changed else set()
    if network := [key for key in changed if key.startswith(("model.", "scale.")) and key not in follows]:
        raise ConfigError(
            f"resume cannot change the network: {', '.join(network)}. Start a new run, with init_from=… if you like."
        )
    with open_dict(saved):
        for key in (key for key, (_, now) in changed.items() if now is ABSENT):
            *parents, last = _parts(key)
            nodes = [saved]
            for part in parents:
                nodes.append(nodes[-1][part])
            del nodes.pop()[last]
            while parents and not nodes[-1][parents[-1]]:
                del nodes.pop()[parents.pop()]
        for key, (_, now) in changed.items():
            if now is not ABSENT:
                *parents, last = _parts(key)
                node = saved
                for part in parents:
                    if not isinstance(node.get(part), DictConfig):
                        node[part] = {}
                    node = node[part]
                node[last] = now


def changes_since(
    checkpoint: Mapping[str, Any], cfg: DictConfig, sections: Sequence[str] = ("optimizer", "scheduler")
) -> Changes:
    """Return what differs in some sections between the config that saved a checkpoint and ``cfg``.

    It is what this command line changes, and what an earlier one did that was stopped before it saved a checkpoint.
    ``optimizer.fused`` is no difference: it follows from the machine and the precision.

    Raises:
        ConfigError: the checkpoint's config is corrupt.
    """
    saved: Any = checkpoint["hyper_parameters"]
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    before, after = ({name: config.get(name) for name in sections} for config in (saved, now))
    for path, value in walk(before):  # within its limits
        if not isinstance(value, dict | list | tuple | str | int | float | None):
            raise ConfigError(f"the checkpoint's {'.'.join(map(str, path))} is corrupt: expected plain values.")
    differences = _differences(_leaves(before), _leaves(after))
    differences.pop("optimizer.fused", None)
    return differences


def restarts_schedule(changed: Changes) -> bool:
    """Return True if the changes concern the optimizer or the schedule, which is then recreated."""
    return any(key.partition(".")[0] in ("optimizer", "scheduler") for key in changed)


def without_places(cfg: DictConfig, named: Sequence[str]) -> DictConfig:
    """Return the config of a command that resumes without ``++data.root=…``, which is meant for the run's own data.

    It says where the data of the run is now, and the default data module, which the command names implicitly, may have
    no such argument. With ``data=…`` on the command line, the config is returned as it is.
    """
    if "data" in named or not any(key in named for key in PLACES):
        return cfg
    rest = copy.deepcopy(cfg)
    with open_dict(rest):
        for key in PLACES:
            section, _, name = key.rpartition(".")
            OmegaConf.select(rest, section).pop(name, None)
    return rest


def check_inputs(run_dir: Path, saved: DictConfig, now: DictConfig) -> None:
    """Check that the data of a run is where its config.yaml says, and log the paths that a resumed run reads.

    An address of the config alone is never contacted and nothing is downloaded to a directory of its choice.

    Raises:
        ConfigError: the data is at a URL, or not in its directory, and this command line does not give ``data.root``.
    """
    root = saved.data.get("root")
    if root is not None and root != now.data.get("root"):
        if is_url(str(root)):
            override = shell_join([hydra_override("++data.root", root)])
            raise ConfigError(f"the run's data is at {root}. If you trust that address, add {override}")
        module: Any = locate("data", saved.data._target_)
        if hasattr(module, "is_in") and not module.is_in(str(root)):
            raise ConfigError(f"the run's data was not found in {root}. Give its current location: ++data.root=DIR")
    inputs = {f"data.{key}": saved.data.get(key) for key in ("root", "shards")}
    given = [f"{key}={value}" for key, value in {**inputs, "init_from": saved.get("init_from")}.items() if value]
    if given:
        log.info(printable(f"reads   {', '.join(given)}  (from {run_dir / CONFIG})"))
    for line in remote_loggers(saved, run_dir):
        log.info(f"sends   {line}")


def remote_loggers(saved: DictConfig, run_dir: Path) -> list[str]:
    """Return a line for each tracker of a saved config: its settings, and the identity under which it continues."""
    found = []
    for name, node in (saved.get("logger") or {}).items():
        kind = locate("logger", node._target_)
        if isinstance(kind, type) and issubclass(kind, Tracker):
            settings = [f"{key}={value}" for key, value in node.items() if key != "_target_"]
            sources = str(run_dir / CONFIG)
            if identity := read_identity(run_dir, kind.service):
                settings, sources = [*settings, f"as run {identity}"], f"{sources}, {run_dir / IDENTITIES}"
            found.append(printable(f"logger.{name}: {kind.__name__} {', '.join(settings)}  (from {sources})"))
    return found


def saved_images(checkpoint: Mapping[str, Any], cfg: DictConfig) -> str | None:
    """Return the ``digest`` of the images that a checkpoint was saved with.

    None if settings that may change the split differ since then, as an allowed change of ``split_seed``, or in a
    checkpoint of an earlier version.
    """
    differences = changes_since(checkpoint, cfg, ("data",))
    if any(_parts(key)[1] not in KEEPING_THE_SPLIT for key in differences):
        return None
    return checkpoint.get("images")


def check_images(saved: str | None, data: ImageDataModule) -> None:
    """Check that a resumed run has the images that it began with.

    With one image more, the split is another one: images that the run has trained on would validate it.

    Args:
        saved: ``data.digest`` when the checkpoint was written; None if it may differ.

    Raises:
        DataError: images were added, removed or moved to another class.
    """
    if saved in (None, data.digest):
        return
    raise DataError(
        f"the images of {data.name} have changed since this run began, and with them its split. Restore them, or start "
        "a new run with init_from=…"
    )


def check_ranks(saved: int | None, now: int) -> None:
    """Check that a run that stopped inside an epoch resumes with as many ranks, whose states were saved.

    Raises:
        ConfigError: another number of ranks.
    """
    if saved is not None and saved != now:
        raise ConfigError(
            f"trainer.devices × trainer.num_nodes={now} is invalid: expected {saved}, the ranks with which this run "
            "stopped inside an epoch."
        )


def check_not_passed(max_epochs: int | None, max_steps: int, position: Position) -> None:
    """Check that the end of the run does not lie before the position that it resumes from.

    Raises:
        ConfigError: fewer epochs or steps than the run has trained already.
    """
    for key, limit, done in (
        ("max_epochs", max_epochs, position.epoch + (position.images > 0)),
        ("max_steps", max_steps, position.step),
    ):
        if limit is not None and 0 < limit < done:
            raise invalid_value(f"trainer.{key}", limit, f"{done} or more, which this run has reached")


def saved_lengths(checkpoint: Mapping[str, Any]) -> SavedLengths | None:
    """Return the lengths that a checkpoint records; None if it was written before they were, or they are unreadable."""
    schedule: Any = checkpoint.get("run_length")
    found = []
    for length in (checkpoint.get("planned_length") or schedule, schedule):
        if not isinstance(length, dict) or set(length) != {"epochs", "steps"}:
            return None
        if not all(type(count) is int and 1 <= count <= MAX_COUNT for count in length.values()):
            return None
        found.append(RunLength(**length))
    return SavedLengths(*found)


def schedule_start(checkpoint: Mapping[str, Any]) -> float:
    """Return the epochs that were done when the schedule of a checkpoint began, 0 unless it was restarted."""
    start = checkpoint.get("schedule_start")
    return start if isinstance(start, float) and 0 <= start < MAX_COUNT else 0.0


def check_length(
    schedule: ScheduleFactory | None, saved: SavedLengths | None, whole: RunLength, left: RunLength, restart: bool
) -> RunLength:
    """Return the length that a resumed run's schedule covers: the whole run, or what is left if it restarts.

    Args:
        saved: lengths that the checkpoint records.
        whole: length as planned now.
        left: what is left of it.

    Raises:
        ConfigError: the schedule follows the length of the run, which has changed: its learning rates so far were those
            of another schedule. Or it restarts with a warm-up longer than what is left.
    """
    if restart:
        if schedule is not None and schedule.warmup_epochs > left.epochs:
            raise invalid_value(
                "scheduler.warmup_epochs", schedule.warmup_epochs, f"at most {left.epochs}, what is left"
            )
        return left
    if saved is None:
        return whole
    if schedule is None or not schedule.auto:  # it may have started within the run
        return RunLength(
            *(
                max(1, n)
                for n in (
                    whole.epochs - saved.run.epochs + saved.schedule.epochs,
                    whole.steps - saved.run.steps + saved.schedule.steps,
                )
            )
        )
    unit = "steps" if schedule.interval == "step" else "epochs"
    before, now = getattr(saved.run, unit), getattr(whole, unit)
    if before != now:
        raise ConfigError(
            f"scheduler.{schedule.auto[0]}=auto is invalid for a run that changes from {before} to {now} {unit}: its "
            "learning rates so far are those of a schedule for the former. Choose another, such as "
            "scheduler=constant, or start a new run with init_from=…"
        )
    return saved.schedule
