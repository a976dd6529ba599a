"""The lock on a run directory, and the readers of its files."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from alexnet_pl.runtime.errors import ConfigError, UserError
from alexnet_pl.runtime.run_folder import (
    Leftovers,
    check_entries,
    finished_result,
    read_commands,
    read_config,
    read_metrics,
    read_result,
    read_trial,
    record_command,
    removing,
    results_table,
    run_lock,
    write_metrics,
    write_result,
)

HOLD = """
import sys, time
from pathlib import Path
from alexnet_pl.runtime.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_second_process_is_refused_until_the_first_is_gone(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as raised, run_lock(run_dir):
            pass
        reason = f"run_dir={run_dir} is in use by another process (pid {holder.pid})."
        assert str(raised.value) == f"{reason} Wait until it ends, or start a new run."
    finally:
        holder.kill()
        holder.wait()
    with run_lock(run_dir):
        pass
    assert [*run_dir.iterdir()] == []


def test_removed_run_directory_is_no_second_error(tmp_path):
    with run_lock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["train.log", "checkpoints", "tensorboard", ".hydra/config.yaml", "checkpoints/best.ckpt"]
)
def test_links_out_of_the_run_directory_are_refused(name, tmp_path):
    precious, run_dir = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / "inside").symlink_to(run_dir / "metrics.csv")
    check_entries(run_dir)
    (run_dir / name).symlink_to(precious)
    reason = f"resume={run_dir} is refused: {run_dir / name} is a link that leaves the run directory."
    with pytest.raises(ConfigError, match=re.escape(reason)):
        check_entries(run_dir)


ODD = [
    ("train.log", os.mkfifo, "is neither a file nor a directory"),
    ("checkpoints/latest.ckpt", os.mkfifo, "is neither a file nor a directory"),
    ("figures/unknown", os.mkfifo, "is neither a file nor a directory"),
    ("metrics.csv", os.mkdir, "is a directory: expected a file"),
    ("checkpoints/SHA256SUMS", os.mkdir, "is a directory: expected a file"),
    (".hydra/config.yaml", os.mkdir, "is a directory: expected a file"),
    ("checkpoints", Path.touch, "is a file: expected a directory"),
    (".hydra", Path.touch, "is a file: expected a directory"),
    ("train.log", "link", "has a second name, a hard link"),
    ("commands.txt", "link", "has a second name, a hard link"),
    (".hydra/hydra.yaml", "link", "has a second name, a hard link"),
    ("checkpoints/latest.ckpt", "link", None),  # replaced as a whole
    ("my-notes", os.mkdir, None),
    ("figures", os.mkdir, None),
]


@pytest.mark.parametrize(("name", "make", "reason"), ODD, ids=[f"{name} {reason}" for name, _, reason in ODD])
def test_entries_that_a_run_cannot_write_are_refused(name, make, reason, tmp_path):
    run_dir, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("mine")
    (run_dir / name).parent.mkdir(parents=True)
    check_entries(run_dir)
    (run_dir / name).hardlink_to(precious) if make == "link" else make(run_dir / name)
    if reason is None:
        check_entries(run_dir)
    else:
        with pytest.raises(ConfigError, match=re.escape(f"resume={run_dir} is refused: {run_dir / name} {reason}")):
            check_entries(run_dir)


@pytest.mark.parametrize(("name", "permissions"), [("metrics.csv", os.R_OK), ("checkpoints", os.R_OK | os.W_OK)])
def test_entries_without_permissions_are_refused(name, permissions, tmp_path, monkeypatch):
    """The tests may run as root, who may do anything."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.csv").touch()
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode & ~permissions == 0 if Path(path).name == name else real(path, mode)
    )
    with pytest.raises(ConfigError, match=f"{name} cannot be read and written by this user"):
        check_entries(tmp_path)


def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path):
    for name in ("metrics.csv", "result.json", "commands.txt", "config.yaml"):
        os.mkfifo(tmp_path / name)
    assert (read_metrics(tmp_path), read_result(tmp_path), read_commands(tmp_path)) == ([], None, [])
    with pytest.raises(ConfigError, match="config.yaml not found"):
        read_config(tmp_path)


def test_an_unreadable_result_is_not_called_corrupt(tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("{}")

    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"result.json cannot be read: Permission denied\.$"):
        read_result(tmp_path)


def test_commands_are_not_appended_through_a_link(tmp_path):
    (tmp_path / "bashrc").write_text("mine")
    (tmp_path / "run").mkdir()
    record_command(tmp_path / "run", "alexnet train\nseed=1")
    record_command(tmp_path / "run", "alexnet train resume=run")
    assert [command for _, command in read_commands(tmp_path / "run")] == [
        "alexnet train seed=1",
        "alexnet train resume=run",
    ]
    (tmp_path / "run" / "commands.txt").unlink()
    (tmp_path / "run" / "commands.txt").symlink_to(tmp_path / "bashrc")
    with pytest.raises(OSError, match="symbolic links"):
        record_command(tmp_path / "run", "alexnet train")
    assert (tmp_path / "bashrc").read_text() == "mine"


# --- config.yaml ----------------------------------------------------------------------------------------------------


def test_config_is_read_as_plain_values(tmp_path):
    text = "lr: 1e-05\nname: größe\nnet:\n  _target_: os.system\n  widths: [1, 2]\nroot: ${oc.env:HOME}\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert read_config(tmp_path) == {
        "lr": 1e-05, "name": "größe", "net": {"_target_": "os.system", "widths": [1, 2]}, "root": "${oc.env:HOME}",
    }  # fmt: skip


BOMB = "a: &a [x, x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "no YAML aliases"),
        ("a: " + "[" * 20_000, "nested more than 32 levels"),
        ("a: b\n" * 100_000, "at most 256 KiB"),
        ("a: [", "expected the node content|did not find"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: !!python/object/apply:os.system [echo]", "a config has no YAML tags"),
        ("- 1", "expected a mapping"),
        ("", None),
        (b"\xff\xfe", "can't decode byte"),
    ],
)
def test_corrupt_config_is_one_line(text, reason, tmp_path):
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    if reason is None:
        assert read_config(tmp_path) == {}
        return
    with pytest.raises(UserError, match=f"^{tmp_path}/config.yaml is corrupt: .*(?:{reason})") as raised:
        read_config(tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_config(tmp_path):
    with pytest.raises(UserError, match="config.yaml not found: .* is not a run directory"):
        read_config(tmp_path)


# --- metrics.csv ----------------------------------------------------------------------------------------------------


def test_metrics_round_trip(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = [{"epoch": 1, "val/loss": 0.1 + 0.2}, {"epoch": 2, "val/loss": math.inf, "test/acc": 1e-300}]
    write_metrics(tmp_path / "metrics.csv", ["epoch", "val/loss", "test/acc"], rows)
    assert read_metrics(tmp_path) == rows
    assert (tmp_path / "metrics.csv").read_bytes().startswith(b"epoch,val/loss,test/acc\r\n1,0.30000000000000004,\r\n")


@pytest.mark.parametrize("content", [b"epoch\nx\n", b"epoch\n1,2\n", b"\xff\n1\n", b"epoch\n\x00\n"])
def test_corrupt_metrics_are_one_line(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/metrics.csv is corrupt: .") as raised:
        read_metrics(tmp_path)
    assert "\n" not in str(raised.value)


# --- result.json ----------------------------------------------------------------------------------------------------


def test_result_round_trip_in_any_locale(tmp_path):
    result = {"status": "finished", "val/acc": 0.5, "device": "2 × cpu"}
    assert read_result(tmp_path) is None
    assert read_trial(tmp_path) == {}
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path) == read_trial(tmp_path) == finished_result(tmp_path) == result
    assert "2 × cpu".encode() in (tmp_path / "result.json").read_bytes()
    write_result(tmp_path / "result.json", {**result, "status": "failed"})
    assert finished_result(tmp_path) is None
    assert read_trial(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "null", ""])
def test_corrupt_result_is_one_line(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/result.json is corrupt: .") as raised:
        read_result(tmp_path)
    assert "\n" not in str(raised.value)
    assert finished_result(tmp_path) is None
    assert read_trial(tmp_path) == {}


def test_results_table():
    result = {
        "val/loss": 0.5,
        "val/acc": 0.75,
        "val/acc_top5": 1.0,
        "test/loss": 0.25,
        "test/acc": 0.5,
        "test/acc_top5": 0.875,
    }
    crops = {"test/loss_ten_crop": 0.125, "test/acc_ten_crop": 0.625, "test/acc_top5_ten_crop": 0.9375}
    lines = [line.split() for line in results_table({**result, **crops}).splitlines()]
    assert lines[1:] == [
        ["validation", "0.5000", "0.7500", "0.2500", "1.0000", "0.0000"],
        ["test", "0.2500", "0.5000", "0.5000", "0.8750", "0.1250"],
        ["ten-crop", "0.1250", "0.6250", "0.3750", "0.9375", "0.0625"],
    ]
    assert len(results_table(json.loads(json.dumps(result))).splitlines()) == 3


# --- what a refused run leaves behind -------------------------------------------------------------------------------


def fill(run_dir: Path, *names: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        (run_dir / name).write_text("mine")


def refuse(leftovers: Leftovers, error: BaseException) -> None:
    with pytest.raises(type(error)), removing(leftovers):
        raise error


@pytest.mark.parametrize("error", [ConfigError("refused"), SystemExit(2)])
def test_a_refused_run_leaves_its_parents_as_they_were(error, tmp_path):
    leftovers = Leftovers(tmp_path / "runs" / "a" / "b")
    fill(tmp_path / "runs" / "a" / "b", "train.log")
    refuse(leftovers, error)
    assert [*tmp_path.iterdir()] == []


def test_what_existed_before_stays(tmp_path):
    run_dir = tmp_path / "empty" / "run"
    run_dir.mkdir(parents=True)
    leftovers = Leftovers(run_dir)
    fill(run_dir, "train.log")
    refuse(leftovers, ConfigError("refused"))
    assert [*run_dir.iterdir()] == []
    fill(run_dir, "train.log", "notes.txt")
    refuse(Leftovers(run_dir), ConfigError("refused"))
    assert {path.name for path in run_dir.iterdir()} == {"train.log", "notes.txt"}


def test_what_others_have_put_there_stays(tmp_path):
    leftovers = Leftovers(tmp_path / "runs" / "a" / "b")
    fill(tmp_path / "runs" / "a" / "b", "train.log")
    fill(tmp_path / "runs" / "another")
    refuse(leftovers, ConfigError("refused"))
    assert [*(tmp_path / "runs").iterdir()] == [tmp_path / "runs" / "another"]


@pytest.mark.parametrize("name", ["config.yaml", "result.json", ".lock"])
def test_a_run_that_has_begun_or_is_another_process_s_keeps_everything(name, tmp_path):
    leftovers = Leftovers(tmp_path / "run")
    fill(tmp_path / "run", "train.log", name)
    refuse(leftovers, UserError("out of memory"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"train.log", name}


@pytest.mark.security
def test_a_table_of_many_columns_is_refused_before_it_is_read(tmp_path):
    """A short row costs as much as a full one: 0.4 MB took hours."""
    (tmp_path / "metrics.csv").write_text(",".join(f"a{i}" for i in range(50_000)) + "\n" + "1\n" * 50_000)
    with pytest.raises(UserError, match=r"metrics.csv is corrupt: more than 1,000 columns"):
        read_metrics(tmp_path)
