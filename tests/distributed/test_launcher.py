"""The single-node launcher, with ranks that are small scripts; tests/faults launches real training."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from alexnet_pl.distributed import launcher
from alexnet_pl.distributed.collectives import RankFailedError
from alexnet_pl.distributed.launcher import launch
from alexnet_pl.runtime.commands import hydra_override

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "OMP_NUM_THREADS", "HYDRA_FULL_ERROR")
rank, how = int(os.environ["RANK"]), sys.argv[1]
Path(f"{rank}.json").write_text(json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}))
if how == "fail" and rank == 1:
    print("Traceback\\nerror: größe is invalid", file=sys.stderr)
    sys.exit(2)
if how == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how in ("fail", "kill", "wait"):
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(140))
    Path(f"{rank}.waits").touch()
    time.sleep(3600)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that launches two ranks of the script in ``tmp_path``."""
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONUTF8", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as one_line_errors sets it
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 2)

    def start(how: str, run_dir: Path = tmp_path / "lr=0.01 (a)") -> list[dict[str, object]]:
        monkeypatch.setattr(sys, "argv", ["train.py", how, "seed=1", "hydra.run.dir=elsewhere"])
        launch(2, run_dir, "alexnet train trust=[my_nets] resume=RUN")
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    return start


def test_ranks_get_the_command_and_torchruns_variables(started, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "usable_cores", lambda: 6)
    for rank, found in enumerate(started("finish")):
        assert found == {
            "argv": ["finish", "seed=1", hydra_override("hydra.run.dir", tmp_path / "lr=0.01 (a)")],
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "OMP_NUM_THREADS": "3", "HYDRA_FULL_ERROR": None,
        }  # fmt: skip


def test_failed_rank_ends_all_with_its_status_and_message(started, capsys):
    with pytest.raises(SystemExit) as stopped:
        started("fail")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: größe is invalid\n"


def test_killed_rank_is_named_with_a_command_to_resume(started):
    with pytest.raises(RankFailedError) as raised:
        started("kill")
    assert str(raised.value) == (
        "rank 1 of 2 was killed by SIGKILL; the others were stopped.\n"
        "To resume: alexnet train trust=[my_nets] resume=RUN"
    )  # fmt: skip
    assert raised.value.exit_code == 1


def test_signals_are_passed_on(started, tmp_path, capsys):
    before = signal.getsignal(signal.SIGUSR2)

    def send() -> None:
        while not all((tmp_path / f"{rank}.waits").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as stopped:
        started("wait")
    sender.join()
    assert stopped.value.code == 140
    assert signal.getsignal(signal.SIGUSR2) == before
