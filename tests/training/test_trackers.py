"""Loggers by name: combinations, missing packages, and wandb and MLflow for real, read back through their own APIs."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import KEEP, SHORT_RUN, config, run_until_stopped
from hydra.errors import InstantiationException
from lightning.pytorch.loggers import Logger
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.run_folder import finished_result, read_metrics
from alexnet_pl.runtime.signals import RunInterrupted
from alexnet_pl.training import trackers
from alexnet_pl.training.build import build_loggers
from alexnet_pl.training.resume import Position
from alexnet_pl.training.run import run

# --- without the packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("none", []),
        ("csv", ["csv"]),
        ("tensorboard", ["tensorboard"]),
        ("default", ["tensorboard", "csv"]),
        ("[tensorboard,wandb,mlflow]", ["tensorboard", "wandb", "mlflow"]),
        ("[csv,none]", ["csv"]),
    ],
)
def test_any_combination_composes(option: str, names: list[str]) -> None:
    assert list(config(f"logger={option}").logger) == names


@pytest.mark.parametrize("option", ["none", "csv", "[tensorboard]"])
def test_metrics_csv_is_always_on(option: str, tmp_path: Path) -> None:
    loggers, metrics = build_loggers(config(f"logger={option}", run_dir=tmp_path), tmp_path, Position())
    assert metrics in loggers
    assert metrics.path == tmp_path / "metrics.csv"


@pytest.mark.slow
def test_a_run_needs_no_tensorboard(tmp_path: Path) -> None:
    """In an environment without the package, a run with another logger trains, tests and draws its figures."""
    script = f"""
import sys
sys.modules["tensorboard"] = None
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from alexnet_pl.__main__ import main
main(["train", *{list(SHORT_RUN)!r}, "logger=none", "hydra.run.dir=run"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr + done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "figures" / "conv1_kernels.png").is_file()
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("option", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(option, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InstantiationException) as refusal:
        build_loggers(config(f"logger={option}", run_dir=tmp_path), tmp_path, Position())
    assert isinstance(refusal.value.__cause__, ConfigError)
    assert f"Install it with: pip install 'alexnet_pl[{option}]'" in str(refusal.value.__cause__)


@pytest.mark.security
@pytest.mark.parametrize("content", ["", "[", '{"wandb": 3}', '{"wandb": "../../x"}', '{"wandb": "a b"}', "[" * 9000])
def test_a_corrupt_or_hostile_identity_is_no_identity(content: str, tmp_path: Path) -> None:
    (tmp_path / trackers.IDENTITIES).write_text(content)
    assert trackers.read_identity(tmp_path, "wandb") is None
    trackers.write_identity(tmp_path, "wandb", "abc")
    trackers.write_identity(tmp_path, "mlflow", "def")
    assert trackers.read_identity(tmp_path, "wandb") == "abc"
    assert trackers.read_identity(tmp_path, "mlflow") == "def"


class Recorder(trackers.Tracker):
    """A tracker that records what it is told, and fails if asked to."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails, self.calls = fails, []

    name = version = property(lambda self: "recorder")

    def _record(self, *call):
        self.calls.append(call)
        if self.fails and call[0] != "start":
            raise ConnectionError("gone")

    def log_hyperparams(self, *arguments):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", *metrics))

    def start(self, run_dir):
        self._record("start", run_dir)

    def log_figures(self, files, step):
        self._record("figures", *(file.name for file in files))

    def log_report(self, page):
        self._record("report", page.name)

    def close(self, status):
        self._record("close", status)


@pytest.mark.parametrize("fails", [False, True])
def test_trackers_get_everything_and_never_end_a_run(fails, tmp_path, monkeypatch, caplog) -> None:
    tracker, real = Recorder(fails), build_loggers

    def with_tracker(*arguments) -> tuple[list[Logger], object]:
        loggers, metrics = real(*arguments)
        return [*loggers, tracker], metrics

    monkeypatch.setattr("alexnet_pl.training.run.build_loggers", with_tracker)
    run(config(*SHORT_RUN, "logger=none", run_dir=tmp_path / "run", figures=True))
    kinds = [call[0] for call in tracker.calls]
    assert kinds[0] == "start"
    assert tracker.calls[-1] == ("close", "finished")
    (figures,) = [call for call in tracker.calls if call[0] == "figures"]
    assert "conv1_kernels.png" in figures
    assert ("report", "report.html") in tracker.calls
    logged = {name for call in tracker.calls if call[0] == "metrics" for name in call[1:]}
    assert {"train/loss", "val/acc", "test/acc", "hp/val_acc_best", "hp/test_acc"} <= logged
    assert ("gone" in caplog.text) == fails


@pytest.mark.parametrize(
    ("error", "status"), [(SystemExit(143), "stopped"), (RunInterrupted(15), "stopped"), (ValueError("x"), "failed")]
)
def test_trackers_are_told_how_a_run_ended(error, status, tmp_path) -> None:
    tracker = Recorder()

    def fail() -> None:
        with trackers.tracking([tracker], tmp_path):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tracker.calls[-1] == ("close", status)


# --- for real -------------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory, without settings of either tracker in the environment."""
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file, wandb's protobuf messages in a LevelDB log with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, message = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # a block is filled up with zeros
            position += left
            continue
        length, part = struct.unpack_from("<HB", content, position + 4)
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def read_wandb(root: Path) -> list[SimpleNamespace]:
    """Return the offline runs in ``root/wandb``, oldest first."""
    found = []
    for file in sorted(root.glob("wandb/offline-run-*/*.wandb")):
        read = SimpleNamespace(id="", project="", config={}, history=[], exit_code=None)
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                read.id, read.project = record.run.run_id, record.run.project
                read.config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            elif kind == "config":
                read.config |= {each.key: json.loads(each.value_json) for each in record.config.update}
            elif kind == "history":
                row = {
                    each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item
                }
                read.history.append(row)
            elif kind == "exit":
                read.exit_code = record.exit.exit_code
        found.append(read)
    return found


@pytest.mark.trackers
def test_wandb_offline(workplace: Path) -> None:
    run_dir = workplace / "run"
    run(config(*SHORT_RUN, "logger=wandb", "logger.wandb.offline=true", run_dir=run_dir, figures=True))
    (read,) = read_wandb(workplace)
    rows = read_metrics(run_dir)
    assert read.project == "alexnet_pl"
    assert [row["val/acc"] for row in read.history if "val/acc" in row] == [row["val/acc"] for row in rows]
    assert read.config["optimizer"]["lr"] == 0.001
    logged = {name.removesuffix("/_type") for row in read.history for name in row}
    assert {"figures/conv1_kernels", "figures/top5", "report", "hp/test_acc"} <= logged
    folder = "wandb/offline-run-*/files/media"
    assert list(workplace.glob(f"{folder}/images/figures/conv1_kernels_*.png"))
    assert list(workplace.glob(f"{folder}/html/report_*.html"))
    assert read.exit_code == 0


@pytest.mark.trackers
def test_two_wandb_runs_in_one_process_are_two_and_a_resumed_one_stays_one(workplace: Path, monkeypatch) -> None:
    settings = (*SHORT_RUN, "logger=wandb", "logger.wandb.offline=true", KEEP)
    for name in ("a", "b"):
        run(config(*settings, run_dir=workplace / name))
    stopped = workplace / "c"
    run_until_stopped(config(*settings, run_dir=stopped), monkeypatch, 3)
    run(config("resume=here", run_dir=stopped))
    reads = read_wandb(workplace)
    assert len({read.id for read in reads}) == 3
    both = [read for read in reads if read.id == trackers.read_identity(stopped, "wandb")]
    assert [read.exit_code for read in both] == [1, 0]


@pytest.mark.trackers
def test_wandb_without_a_login_is_refused_before_data_is_read(workplace: Path, monkeypatch) -> None:
    monkeypatch.setattr("alexnet_pl.training.run.load_data", lambda *arguments: pytest.fail("data was read"))
    with pytest.raises(ConfigError, match="wandb login.*logger.wandb.offline=true") as refused:
        run(config(*SHORT_RUN, "logger=wandb", run_dir=workplace / "run"))
    assert ".." not in str(refused.value)


@pytest.mark.trackers
def test_mlflow_in_a_local_store(workplace: Path, monkeypatch) -> None:
    from mlflow.tracking import MlflowClient

    run_dir, stopped = workplace / "run", workplace / "stopped"
    run(config(*SHORT_RUN, "logger=[mlflow,tensorboard]", run_dir=run_dir, figures=True))
    client = MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("alexnet_pl")
    (found,) = client.search_runs([experiment.experiment_id])
    result, rows = finished_result(run_dir), read_metrics(run_dir)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["test/acc"] == found.data.metrics["hp/test_acc"] == result["test/acc"]
    history = [metric.value for metric in client.get_metric_history(found.info.run_id, "val/acc")]
    assert history == [row["val/acc"] for row in rows]
    assert found.data.params["optimizer.lr"] == "0.001"
    assert found.data.params["model._target_"] == "alexnet_pl.models.LeNet5"
    figures = [Path(file.path).name for file in client.list_artifacts(found.info.run_id, "figures")]
    assert "conv1_kernels.png" in figures
    page = client.download_artifacts(found.info.run_id, "report.html", str(workplace))
    assert Path(page).read_bytes() == (run_dir / "report.html").read_bytes()
    assert (run_dir / "tensorboard").is_dir()

    run_until_stopped(config(*SHORT_RUN, "logger=mlflow", KEEP, run_dir=stopped), monkeypatch, 3)
    identity = trackers.read_identity(stopped, "mlflow")
    assert client.get_run(identity).info.status == "KILLED"
    run(config("resume=here", run_dir=stopped))
    assert client.get_run(identity).info.status == "FINISHED"
    assert len(client.search_runs([experiment.experiment_id])) == 2


@pytest.mark.trackers
def test_an_unreachable_mlflow_store_is_refused_before_data_is_read(workplace: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    monkeypatch.setattr("alexnet_pl.training.run.load_data", lambda *arguments: pytest.fail("data was read"))
    with pytest.raises((ConfigError, InstantiationException), match="MLFLOW_TRACKING_URI"):
        run(config(*SHORT_RUN, "logger=mlflow", run_dir=workplace / "run"))


@pytest.mark.trackers
@pytest.mark.parametrize("server", ["closed", "silent"])
def test_an_mlflow_server_that_does_not_answer_is_one_line(server, workplace: Path, monkeypatch, caplog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if server == "closed":
            listening.close()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setitem(trackers._IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setattr("alexnet_pl.training.run.load_data", lambda *arguments: pytest.fail("data was read"))
        with pytest.raises(ConfigError, match="logger=mlflow is invalid: .*MLFLOW_TRACKING_URI") as refused:
            run(config(*SHORT_RUN, "logger=mlflow", run_dir=workplace / "run"))
    assert f"API request to {address}/api" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Retrying" not in caplog.text


def test_mlflow_is_hurried_only_where_nobody_has_said_otherwise(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    with trackers.impatient():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"


def test_a_server_that_is_lost_during_training_costs_its_metrics_and_not_the_run(monkeypatch, caplog) -> None:
    tracker = object.__new__(trackers.MLflowTracker)
    tracker._is_lost, hurried, sent = False, [], []

    def send(self: object, metrics: dict[str, float], step: int) -> None:
        hurried.append("MLFLOW_HTTP_REQUEST_TIMEOUT" in os.environ)
        if step in (2, 3):
            raise ConnectionError("gone")
        sent.append(step)

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setattr(trackers.MLFlowLogger, "log_metrics", send)
    for step in (1, 2, 3, 4, 5):
        tracker.log_metrics({"val/acc": 0.5}, step)
    assert sent == [1, 4, 5]
    assert hurried == [False, False, True, True, False]
    assert caplog.text.count("metrics were not logged, see metrics.csv: gone") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_thread_prints_one_line(tmp_path, monkeypatch, caplog):
    hooked = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: hooked.append(arguments.exc_type))
    with trackers.tracking([], tmp_path):
        writer = EventFileWriter(str(tmp_path / "gone"))
        shutil.rmtree(tmp_path / "gone")
        writer.add_event(Event())
        writer.close()
        other = threading.Thread(target=lambda: 1 / 0)
        other.start()
        other.join()
    assert hooked == [ZeroDivisionError]
    assert caplog.messages == ["warning: TensorBoard's events were not written: No such file or directory"]
