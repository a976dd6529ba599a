"""Loading a trained run from its directory or from a lone checkpoint file: ``load_run``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from alexnet_pl import __version__
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.rehearsal import check_side, rehearse
from alexnet_pl.config.schema import locate
from alexnet_pl.config.trust import check_targets
from alexnet_pl.data.datamodule import ImageDataModule, logit_names
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.inference.hub import is_hub_address, pull
from alexnet_pl.runtime.errors import UserError, one_line
from alexnet_pl.runtime.run_folder import read_result
from alexnet_pl.training.checkpoint_io import read_checkpoint

CHECKPOINT = "checkpoints/best.ckpt"

_RUN_FILES = ("config.yaml", "metrics.csv", "train.log")


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """A trained network with everything that using it requires.

    Attributes:
        net: the network in eval mode on the CPU: normalized images ``(N, 3, S, S)`` → logits ``(N, classes)``.
        preprocess: PIL images → normalized images ``(N, 3, S, S)``.
        class_names: name of each logit that the data has a class for, in order.
        config: the run's resolved config, plain values.
        checkpoint: the file that was loaded.
        epoch: the epoch it was saved in, counted from 1.
        result: the run's ``result.json``; None unless this is the best checkpoint of a finished run.
        data_class: class of the run's data module.
        trust: modules outside this project that the user allowed the run to import.
    """

    net: nn.Module
    preprocess: Preprocess
    class_names: tuple[str, ...]
    config: dict[str, Any]
    checkpoint: Path
    epoch: int
    result: dict[str, Any] | None
    data_class: type[ImageDataModule]
    trust: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"TrainedRun {self.checkpoint}: {self.name}, epoch {self.epoch}, {len(self.class_names)} classes"

    @property
    def folder(self) -> Path:
        """The run directory, or the directory of a lone checkpoint."""
        parent = self.checkpoint.parent
        return parent.parent if parent.name == Path(CHECKPOINT).parent.name else parent

    @property
    def logit_names(self) -> list[str]:
        """The class names, followed by a number for each logit without a class."""
        return logit_names(self.class_names, self.config["model"]["num_classes"])

    @property
    def name(self) -> str:
        """Network and dataset, such as ``AlexNet on cifar10``."""
        return f"{type(self.net).__name__} on {self.data_class.name}"

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the softmax ``(N, len(class_names))`` in float32 of normalized images ``(N, 3, S, S)``."""
        with torch.inference_mode():
            # Training allows more logits than classes; the surplus ones never had an example.
            logits: Tensor = self.net(images)
            return logits.float().softmax(1)[:, : len(self.class_names)]


def load_run(run: str | Path, trust: Sequence[str] = ()) -> TrainedRun:
    """Load a trained network::

        from alexnet_pl import load_run
        run = load_run("runs/alexnet_lrn_cifar10/2026-…")
        run.probabilities(run.preprocess(PIL.Image.open("cat.jpg")))     # (1, 10), named by run.class_names

    Safe for files from strangers: nothing in the checkpoint is executed (``weights_only``), and its config may only
    name network classes of this project, torch and torchvision, which is checked before anything is imported. Needs
    neither a GPU nor the training data, and works wherever the run directory has been moved to.

    Args:
        run: run directory, whose best checkpoint is loaded, a checkpoint file, or ``hf://USER/NAME``, which
            ``alexnet push`` has written.
        trust: modules of your own that the run may import in addition, for a network from your own file.

    Raises:
        UserError: no run, a missing or corrupt file, a config that is refused, or a file from a newer version.
    """
    if is_hub_address(run):
        checkpoint, file, result = pull(str(run))
        return assemble(str(run), file, checkpoint, result, trust)
    path = checkpoint_file(Path(run))
    checkpoint, file = read_run_checkpoint(path), path.resolve()
    result = read_result(file.parents[1]) if file.parts[-2:] == Path(CHECKPOINT).parts else None
    result = result if result is not None and result.get("status") == "finished" else None  # a trial may have failed
    return assemble(str(path), file, checkpoint, result, trust)


def assemble(
    path: str, file: Path, checkpoint: Mapping[str, Any], result: dict[str, Any] | None, trust: Sequence[str]
) -> TrainedRun:
    """Check the parts of a checkpoint, which may come from a stranger, and build the run from them.

    Args:
        path: where they come from, for messages.
        file: the file of the weights.

    Raises:
        UserError: a config that is refused, weights that do not fit it, or a file from a newer version.
    """
    config = checkpoint["hyper_parameters"]
    check_version(path, config.get("version"))
    try:
        check_targets({"model": config["model"], "data": config["data"]}, trust)
        kind = find_data_class(config["data"], trust)
        preprocess = make_preprocess(config["data"], kind)
        net = load_net(config["model"], checkpoint["state_dict"], preprocess.image_size, trust)
        class_names = check_class_names(config.get("class_names") or kind.class_names, config["model"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # constructors raise anything for arguments that they do not know
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{path} does not fit this version of alexnet_pl: {reason[:300]}") from error
    return TrainedRun(
        net, preprocess, class_names, dict(config), file, checkpoint["epoch"] + 1, result, kind, tuple(trust)
    )


def checkpoint_file(run: Path) -> Path:
    """Return the best checkpoint of a run directory; a file is returned as it is.

    Raises:
        UserError: the path does not exist or is not a run directory, or the run has no checkpoint yet.
    """
    try:
        if run.is_file():
            return run
        if not run.exists():
            raise UserError(f"{run} not found. Give a run directory or a checkpoint file.")
        if (run / CHECKPOINT).is_file():
            return run / CHECKPOINT
        is_run = any((run / name).exists() for name in _RUN_FILES)
    except (OSError, ValueError) as error:  # a name that is too long, a null byte
        raise UserError(f"{run} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if is_run:
        raise UserError(f"{run} has no {CHECKPOINT}: its first epoch has not ended, or the file was removed.")
    raise UserError(f"{run} is not a run directory: {CHECKPOINT} not found.")


def read_run_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint of :class:`alexnet_pl.training.classifier.ImageClassifier` on the CPU; nothing is executed.

    Raises:
        UserError: the file is corrupt, holds more than tensors and plain values, or belongs to another project.
    """
    checkpoint = read_checkpoint(path)
    parts = {"state_dict": Mapping, "hyper_parameters": Mapping, "epoch": int}
    if not all(isinstance(checkpoint.get(key), kind) for key, kind in parts.items()):
        raise UserError(f"{path} is not a checkpoint of an alexnet_pl run: expected {', '.join(parts)}.")
    config = checkpoint["hyper_parameters"]
    if missing := [section for section in ("model", "data") if not isinstance(config.get(section), Mapping)]:
        raise UserError(f"{path} is not a checkpoint of an alexnet_pl run: its config lacks {', '.join(missing)}.")
    return checkpoint


def check_version(path: Path | str, written_by: Any) -> None:
    """Refuse a file from a later release, whose entries may mean something else. No version means 0.1.

    Raises:
        UserError: major or minor version above the installed one's, or not a version at all.
    """
    if written_by is None:
        return
    try:
        version = Version(written_by)
    except (InvalidVersion, TypeError) as error:
        raise UserError(f"{path} is corrupt: {str(written_by)[:50]!r} is not a version of alexnet_pl.") from error
    if version.release[:2] > Version(__version__).release[:2]:
        raise UserError(
            f"{path} was written by alexnet_pl {written_by}, newer than this {__version__}. Update alexnet_pl."
        )


def load_net(
    model: Mapping[str, Any], state_dict: Mapping[str, Any], image_size: int, trust: Sequence[str] = ()
) -> nn.Module:
    """Return the network with its trained weights, in eval mode.

    The sizes in the config are compared with the weights before memory is allocated: a small file cannot ask for
    terabytes. Networks that the user trusts are exempt, because they need not support the meta device.

    Args:
        state_dict: of the classifier; the network's entries start with ``net.``.
        image_size: side of the input in pixels.

    Raises:
        UserError: the config is refused, or describes another network than the weights are of.
    """
    weights = {name.removeprefix("net."): value for name, value in state_dict.items() if name.startswith("net.")}
    check_targets({"model": dict(model)}, trust)
    rehearsed = rehearse(model, image_size, trust)
    if rehearsed is not None:
        expected = {name: value.shape for name, value in rehearsed.state_dict().items()}
        if expected != {name: value.shape for name, value in weights.items()}:
            raise UserError("its weights do not fit the network in its config, or not this version of alexnet_pl.")
        stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
        if sum(value.nbytes for value in weights.values()) > sum(stored.values()):
            raise UserError("its weights are corrupt: they are larger than what the file stores.")
    with torch.random.fork_rng(devices=[]):  # initial weights, replaced below, must not advance the caller's generator
        net = instantiate(dict(model))
    if not isinstance(net, nn.Module):
        raise UserError(f"model._target_={model.get('_target_')} is invalid: expected a network class.")
    net.load_state_dict(weights)
    return net.eval()


def make_preprocess(data: Mapping[str, Any], kind: type[ImageDataModule]) -> Preprocess:
    """Return the preprocessing that a run's ``data`` section describes.

    Raises:
        UserError: a side out of range, or normalization other than by three finite numbers.
    """
    for key in ("image_size", "resize_size"):
        side = data.get(key)
        if not (key == "resize_size" and side is None):
            check_side(f"data.{key}", side)
    mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not torch.tensor([*mean, *std]).isfinite().all() or min(std) <= 0:
        raise UserError("data.mean and data.std are invalid: expected three finite numbers each, std above 0.")
    return Preprocess(data["image_size"], mean, std, data.get("resize_size"), kind.keep_ratio)


def check_class_names(names: Any, model: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names of a checkpoint as a tuple.

    Raises:
        UserError: they are not text, or more than the network has logits.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError("class_names is invalid: expected a list of text.")
    if not 1 <= len(names) <= model["num_classes"]:
        raise UserError(f"class_names is invalid: expected 1 to {model['num_classes']} names, not {len(names)}.")
    return tuple(names)


def find_data_class(data: Mapping[str, Any], trust: Sequence[str] = ()) -> type[ImageDataModule]:
    """Return the class of a run's data module. It is only imported if a config from a run directory may name it.

    Raises:
        UserError: the section names something else.
    """
    target = data.get("_target_")
    check_targets({"data": {"_target_": target}}, trust)
    found = locate("data", cast("str", target))
    if not isinstance(found, type) or not issubclass(found, ImageDataModule):
        raise UserError(f"data._target_={target} is invalid: expected a data module of alexnet_pl.")
    return found
