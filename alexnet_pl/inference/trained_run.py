"""Loading a trained run, from its folder or from a checkpoint file alone: ``load_run``."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from packaging.version import Version
from torch import Tensor, nn

from alexnet_pl import __version__
from alexnet_pl.config.trust import check_targets
from alexnet_pl.data.datamodule import logit_names
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import read_result
from alexnet_pl.training.checkpoint_io import read_checkpoint

log = logging.getLogger(__name__)


CHECKPOINT = "checkpoints/best.ckpt"

RUN_HELP = "run folder (its best checkpoint), or a checkpoint file"

_RUN_FILES = ("config.yaml", "metrics.csv", "train.log")


@dataclass(frozen=True)
class TrainedRun:
    """A trained network with all that its use takes.

    Attributes:
        net: the network in eval mode on the CPU: normalised images ``(N, 3, S, S)`` → logits ``(N, classes)``.
        preprocess: PIL pictures → normalised images ``(N, 3, S, S)``.
        class_names: a name for each logit that the data has a class for, in order.
        config: the run's resolved configuration, plain values.
        checkpoint: the file that was loaded.
        epoch: the epoch it is from, counted from 1.
        result: the run's ``result.json``; None for any but the best checkpoint of a finished run.
    """

    net: nn.Module
    preprocess: Preprocess
    class_names: tuple[str, ...]
    config: dict[str, Any]
    checkpoint: Path
    epoch: int
    result: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """The run folder, or the folder that a lone checkpoint lies in."""
        above = self.checkpoint.parent
        return above.parent if above.name == Path(CHECKPOINT).parent.name else above

    @property
    def logit_names(self) -> list[str]:
        """The class names, and a number for logits that no class of the data has."""
        return logit_names(self.class_names, self.config["model"]["num_classes"])

    @property
    def name(self) -> str:
        """Network and data set, such as ``AlexNet on cifar10``."""
        return f"{type(self.net).__name__} on {data_class(self.config).name}"

    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax ``(N, len(class_names))`` in float32 of normalised images ``(N, 3, S, S)``."""
        with torch.inference_mode():
            # More logits than classes is allowed in training; those beyond never had an example.
            return self.net(images).float().softmax(1)[:, : len(self.class_names)]


def load_run(run: str | Path) -> TrainedRun:
    """Load a trained network::

        from alexnet_pl import load_run
        run = load_run("runs/alexnet_lrn_cifar10/2026-…")
        run.probabilities(run.preprocess(PIL.Image.open("cat.jpg")))     # (1, 10), named by run.class_names

    Nothing in the file is executed (``weights_only``), and from its configuration only network classes of this
    project, torch and torchvision are made. It takes neither a GPU nor the training data, and works wherever the
    run folder lies now.

    Args:
        run: run folder, whose best checkpoint is taken, or a checkpoint file.

    Raises:
        UserError: no run, a missing or damaged file, a file from a newer version; one line each.
    """
    path = checkpoint_file(Path(run))
    checkpoint = classifier_checkpoint(path)
    config = checkpoint["hyper_parameters"]
    refuse_newer(path, config.get("version"))
    try:
        net = build_net(config["model"])
        weights = checkpoint["state_dict"].items()
        net.load_state_dict({name.removeprefix("net."): value for name, value in weights if name.startswith("net.")})
        data = config["data"]
        mean, std = tuple(data["mean"]), tuple(data["std"])
        preprocess = Preprocess(data["image_size"], mean, std, data.get("resize_size"), data_class(config).keep_ratio)
        class_names = tuple(config.get("class_names") or data_class(config).class_names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever a constructor says to arguments it does not know
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{path} does not fit this version of alexnet_pl: {reason[:300]}") from error
    path = path.resolve()
    result = read_result(path.parents[1]) if path.parts[-2:] == Path(CHECKPOINT).parts else None
    return TrainedRun(net.eval(), preprocess, class_names, config, path, checkpoint["epoch"] + 1, result)


def checkpoint_file(run: Path) -> Path:
    """The best checkpoint of a run folder; a file is taken as it is.

    Raises:
        UserError: nothing there, no run folder, or a run folder without the checkpoint.
    """
    if run.is_file():
        return run
    if not run.exists():
        raise UserError(f"{run} does not exist. Give a run folder or a checkpoint file.")
    if (run / CHECKPOINT).is_file():
        return run / CHECKPOINT
    if any((run / name).exists() for name in _RUN_FILES):
        raise UserError(f"{run} lacks {CHECKPOINT}: its first epoch has not ended, or the file was removed.")
    raise UserError(f"{run} is no run folder: it has no {CHECKPOINT}.")


def classifier_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of :class:`alexnet_pl.training.classifier.ImageClassifier` on the CPU, with nothing executed.

    Raises:
        UserError: no checkpoint, a damaged one, one with more than tensors and plain values, or another project's.
    """
    checkpoint = read_checkpoint(path)
    parts = {"state_dict": Mapping, "hyper_parameters": Mapping, "epoch": int}
    if not all(isinstance(checkpoint.get(k), v) for k, v in parts.items()):
        raise UserError(f"{path} is no checkpoint of an alexnet_pl run: it lacks {', '.join(parts)}.")
    if missing := [part for part in ("model", "data") if part not in checkpoint["hyper_parameters"]]:
        raise UserError(f"{path} is no checkpoint of an alexnet_pl run: its configuration lacks {', '.join(missing)}.")
    return checkpoint


def refuse_newer(path: Path, written_by: str | None) -> None:
    """Refuse what a later release wrote: it may load and mean something else. Without a version it is from 0.1.

    Raises:
        UserError: major or minor version above the installed one's.
    """
    if written_by is not None and Version(written_by).release[:2] > Version(__version__).release[:2]:
        raise UserError(
            f"{path} was written by alexnet_pl {written_by}, newer than this {__version__}. Update alexnet_pl."
        )


def build_net(model: Mapping[str, Any]) -> nn.Module:
    """The network that a run's ``model`` section describes, untrained.

    Raises:
        UserError: the section names anything but classes that a configuration from a run folder may name.
    """
    check_targets({"model": dict(model)})
    return instantiate(dict(model))


def data_class(config: Mapping[str, Any]) -> type:
    """The class of the run's data module.

    Raises:
        UserError: the configuration names something else.
    """
    from alexnet_pl.data.datamodule import ImageDataModule

    target = config["data"].get("_target_")
    found = get_class(target) if isinstance(target, str) and target.startswith("alexnet_pl.data.") else None
    if found is None or not issubclass(found, ImageDataModule):
        raise UserError(f"its configuration names {target}, which is no data module of alexnet_pl.")
    return found
