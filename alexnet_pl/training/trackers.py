"""Experiment trackers: Weights & Biases and MLflow, which also receive figures, the report and how the run ended.

A run directory never names an address or an account. Both come from the tracker's own settings on this machine
(``wandb login``, ``WANDB_ENTITY``, ``MLFLOW_TRACKING_URI``), so that a run from elsewhere cannot redirect what it logs.
"""

import json
import logging
import os
import re
import secrets
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from alexnet_pl.distributed.environment import get_world
from alexnet_pl.runtime.errors import ConfigError, UserError, one_line, os_reason
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.signals import RunInterrupted

log = logging.getLogger(__name__)

IDENTITIES = "trackers.json"
"""File in a run directory: tracker → the identity of this run there, under which a resumed run continues."""

Status = Literal["finished", "failed", "stopped"]


class Tracker(Logger):
    """What a logger needs to receive a whole run: figures, the report and the end, beside scalars and settings.

    Attributes:
        service: name of the tracker in ``trackers.json``.
    """

    service = ""

    @abstractmethod
    def start(self, run_dir: Path) -> None:
        """Open the run at the tracker, or continue it.

        Args:
            run_dir: run directory, which remembers the run's identity at the tracker.

        Raises:
            ConfigError: the tracker refuses, with a way out.
        """

    @abstractmethod
    def log_figures(self, files: Sequence[Path], step: int) -> None:
        """Log PNG files under ``figures/``."""

    @abstractmethod
    def log_report(self, page: Path) -> None:
        """Log ``report.html``."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """End the run at the tracker, so that the next one in this process gets its own."""


def trackers(loggers: Sequence[Logger]) -> list[Tracker]:
    """Return the trackers among ``loggers``."""
    return [logger for logger in loggers if isinstance(logger, Tracker)]


@contextmanager
def tracking(loggers: Sequence[Logger], run_dir: Path) -> Iterator[None]:
    """Start the trackers on rank 0 and close them however the block ends. A failure to close is only a warning.

    Raises:
        ConfigError: a tracker refuses to start.
    """
    started = trackers(loggers) if get_world().rank == 0 else []
    status: Status = "failed"
    try:
        for tracker in started:
            tracker.start(run_dir)
        with _quiet_writer_threads():
            yield
        status = "finished"
    except (RunInterrupted, SystemExit, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        for tracker in started:
            attempt(tracker, "its end was not recorded", lambda tracker=tracker: tracker.close(status))


@contextmanager
def _quiet_writer_threads() -> Iterator[None]:
    """Print one line in place of a traceback when a writer thread of TensorBoard cannot write its file."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if is_writer and isinstance(arguments.exc_value, OSError):
            log.warning(f"warning: TensorBoard's events were not written: {os_reason(arguments.exc_value)}")
        else:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def attempt(tracker: Tracker, failure: str, act: Any) -> None:
    """Log any exception of ``act``: a tracker must never abort training."""
    try:
        act()
    except Exception as error:  # network, disk, a service that has gone
        log.warning(f"warning: {type(tracker).__name__}: {failure}: {one_line(error)[:300]}")


def require(package: str, option: str) -> None:
    """Check that the package of a logger is installed.

    Raises:
        ConfigError: it is not, with the command that installs it.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"logger={option} is invalid: expected the package {package}, which is not installed. "
            f"Install it with: pip install 'alexnet_pl[{option}]'"
        )


def read_identity(run_dir: Path, tracker: str) -> str | None:
    """Return the identity of the run at a tracker; None if it has none yet, or an unreadable one."""
    try:
        with (run_dir / IDENTITIES).open("rb") as file:
            found = json.loads(file.read(10_000))[tracker]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found, re.ASCII) else None


def write_identity(run_dir: Path, tracker: str, identity: str) -> None:
    """Add the identity of the run at a tracker to those of the others.

    Raises:
        UserError: the file cannot be written.
    """
    others = {name: found for name in ("wandb", "mlflow") if (found := read_identity(run_dir, name))}
    try:
        write_atomic(run_dir / IDENTITIES, json.dumps({**others, tracker: identity}) + "\n")
    except OSError as error:
        raise UserError(f"{run_dir / IDENTITIES} cannot be written: {os_reason(error)}.") from error


def run_name(run_dir: Path) -> str:
    """Return a name such as ``alexnet_lrn_cifar10/2026-11-22_10-00-00_000000``."""
    return "/".join(run_dir.absolute().parts[-2:])


class WandbTracker(WandbLogger, Tracker):
    """Weights & Biases. Its files are in ``$WANDB_DIR/wandb``, by default in ``wandb/`` of the working directory.

    Args:
        project: name of the project.
        offline: write files for ``wandb sync`` instead of sending, as ``WANDB_MODE=offline`` does.

    Raises:
        ConfigError: wandb is not installed.
    """

    service = "wandb"

    def __init__(self, project: str = "alexnet_pl", offline: bool = False):
        require("wandb", "wandb")
        # Not Lightning's own ``offline``, which would set WANDB_MODE for all later runs of this process.
        mode: dict[str, Any] = {"mode": "offline"} if offline else {}
        folder = Path(os.environ.get("WANDB_DIR", ".")).absolute()  # wandb's service keeps its first working directory
        super().__init__(project=project, save_dir=folder, **mode)

    @rank_zero_only
    def start(self, run_dir: Path) -> None:
        import wandb  # of the extra "wandb"

        identity = read_identity(run_dir, self.service)
        settings = wandb.Settings(console="off")  # it would capture stdout
        self._wandb_init |= {"id": identity or secrets.token_hex(8), "name": run_name(run_dir), "settings": settings}
        self._wandb_init.pop("anonymous", None)  # Lightning's, about which wandb warns
        try:
            _ = self.experiment
        except wandb.errors.Error as error:
            raise ConfigError(
                f"logger=wandb is invalid: {one_line(error)[:200].rstrip('.')}. Log in with: wandb login, or log to "
                "files with: logger.wandb.offline=true"
            ) from error
        if identity is None:
            write_identity(run_dir, self.service, self._wandb_init["id"])

    @rank_zero_only
    def log_figures(self, files: Sequence[Path], step: int) -> None:
        import wandb  # of the extra "wandb"

        images = {f"figures/{file.stem}": wandb.Image(str(file)) for file in files}
        self.experiment.log({**images, "trainer/global_step": step})

    @rank_zero_only
    def log_report(self, page: Path) -> None:
        import wandb  # of the extra "wandb"

        self.experiment.log({"report": wandb.Html(str(page), inject=False)})

    @rank_zero_only
    def close(self, status: Status) -> None:
        if self._experiment is not None:
            self.experiment.finish(exit_code=0 if status == "finished" else 1)
            self._experiment = None


_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""MLflow's own settings are 7 retries of 120 seconds, without a word."""


@contextmanager
def impatient() -> Iterator[None]:
    """Let MLflow try twice for 5 seconds each, unless the environment says something else."""
    added = {name: value for name, value in _IMPATIENT.items() if name not in os.environ}
    os.environ.update(added)
    retries = logging.getLogger("urllib3.connectionpool")
    before = retries.level
    retries.setLevel(logging.ERROR)  # it warns of every one
    try:
        yield
    finally:
        retries.setLevel(before)
        for name in added:
            os.environ.pop(name, None)


class MLflowTracker(MLFlowLogger, Tracker):
    """MLflow, at ``MLFLOW_TRACKING_URI``: by default the SQLite file ``mlflow.db`` that ``mlflow ui`` opens as well.

    Args:
        experiment: name of the experiment.

    Raises:
        ConfigError: MLflow is not installed, or its store cannot be opened.
    """

    service = "mlflow"

    def __init__(self, experiment: str = "alexnet_pl"):
        require("mlflow", "mlflow")
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
        self._is_lost = False
        try:
            super().__init__(experiment, tracking_uri=address)
        except Exception as error:  # MLflow's and SQLAlchemy's own
            raise _mlflow_refusal(error) from error

    @rank_zero_only
    def start(self, run_dir: Path) -> None:
        self._run_id, self._run_name = read_identity(run_dir, self.service), run_name(run_dir)
        try:
            with impatient():
                identity = str(self.run_id)
                self.experiment.update_run(identity, status="RUNNING")
        except Exception as error:  # MLflow's, SQLAlchemy's and those of requests
            raise _mlflow_refusal(error) from error
        write_identity(run_dir, self.service, identity)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars. A server that is lost during training costs MLflow's full patience once, and then seconds."""
        lost, self._is_lost = self._is_lost, True

        def send() -> None:
            super(MLflowTracker, self).log_metrics(metrics, step)
            self._is_lost = False

        with impatient() if lost else nullcontext():
            attempt(self, "metrics were not logged, see metrics.csv", send)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]  # never a Namespace here
        """Log the config under the names of the command line.

        Parameters cannot change in MLflow, so a resumed run adds the values that it has changed as tags.
        """
        import pandas as pd  # here for start-up time
        from mlflow.entities import Param, RunTag  # of the extra "mlflow"

        (flat,) = pd.json_normalize([dict(params)], sep=".").to_dict("records")
        values = {str(name): str(value)[:6000] for name, value in flat.items()}
        logged = self.experiment.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in logged]
        changed = {name: value for name, value in values.items() if logged.get(name, value) != value}
        for start in range(0, len(new), 100):  # MLflow's limit
            self.experiment.log_batch(run_id=self.run_id, params=new[start : start + 100])
        self.experiment.log_batch(
            run_id=self.run_id, tags=[RunTag(f"resumed.{name}", value) for name, value in changed.items()]
        )

    @rank_zero_only
    def log_figures(self, files: Sequence[Path], step: int) -> None:
        for file in files:
            self.experiment.log_artifact(self.run_id, str(file), "figures")

    @rank_zero_only
    def log_report(self, page: Path) -> None:
        self.experiment.log_artifact(self.run_id, str(page))

    def finalize(self, status: str = "success") -> None:
        """Do nothing: Lightning calls this after training, when the test, figures and report are still to come."""

    @rank_zero_only
    def close(self, status: Status) -> None:
        if self._run_id is not None:
            ended = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status]
            self.experiment.set_terminated(self.run_id, ended)


def _mlflow_refusal(error: Exception) -> ConfigError:
    request, separator, _ = one_line(error).partition(" failed with exception ")  # of urllib3, which repeats it all
    reason = f"{request} failed" if separator else request[:200].rstrip(".")
    return ConfigError(
        f"logger=mlflow is invalid: {reason}. Expected a reachable store in MLFLOW_TRACKING_URI that "
        f"holds the run if it is resumed; delete {IDENTITIES} in its directory to log it anew."
    )
