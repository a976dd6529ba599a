"""One-line errors, and text that is safe to print."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alexnet_pl.config.hydra_versions import VERSION_BASE, instantiate, register_resolver
from alexnet_pl.runtime.errors import (
    ConfigError,
    DataError,
    UserError,
    csv_safe,
    did_you_mean,
    one_line,
    one_line_errors,
    os_reason,
    printable,
    user_environment,
    user_message,
)

CONF = Path(__file__).resolve().parents[2] / "conf"


def raised_by(function, *arguments, **keywords) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the caller looks at it
        function(*arguments, **keywords)
    return raised.value


def composed(*overrides: str) -> object:
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        return compose("train", overrides=list(overrides))


def refuse(reason: str) -> None:
    raise DataError(reason)


# --- text -----------------------------------------------------------------------------------------------------------


def test_one_line():
    assert one_line(ValueError(" two\n  lines\t")) == "two lines"
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.security
def test_printable_removes_what_a_terminal_acts_on():
    hostile = "ant\x1b[2J\x1b]0;owned\x07\r\n\x00\x9b31m\u202egnp\u200f"
    assert printable(hostile) == "ant[2J]0;owned31mgnp"
    assert printable("Größe 日本 é") == "Größe 日本 é"


@pytest.mark.security
@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "＝1", "＋1"])
def test_csv_safe_disarms_formulas(text):
    assert csv_safe(text) == "'" + printable(text)
    assert csv_safe("ant = bee") == "ant = bee"


def test_did_you_mean():
    assert did_you_mean("widht", ["width", "depth"]) == " Did you mean width?"
    assert did_you_mean("x", ["width", "depth"]) == " Available: width, depth."
    assert did_you_mean("x", []) == ""


def test_full_disk_has_the_systems_words(tmp_path):
    """Fill /dev/full through both of torch's writers."""
    for target in ("/dev/full", open("/dev/full", "wb")):  # noqa: SIM115 - closing it fails
        error = raised_by(torch.save, {"a": torch.zeros(1_000_000)}, target)
        assert os_reason(error) == "No space left on device"
    assert os_reason(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")) == (
        "No space left on device"
    )
    assert os_reason(OSError(errno.EROFS, os.strerror(errno.EROFS))) == "Read-only file system"
    assert os_reason(RuntimeError("else\n")) == "else"


# --- translation ----------------------------------------------------------------------------------------------------


def test_user_errors_are_found_below_hydra_and_omegaconf():
    assert user_message(DataError("gone")) == ("gone", 2)
    nested = raised_by(instantiate, {"_target_": "runtime.test_errors.refuse", "reason": "gone"})
    assert user_message(nested) == ("gone", 2)
    register_resolver("refuse", refuse)
    resolving = raised_by(lambda: OmegaConf.create({"a": "${refuse:gone}"}).a)
    assert user_message(resolving) == ("gone", 2)
    assert user_message(ZeroDivisionError()) is None
    assert user_message(RuntimeError("a bug")) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=/x/year=2024", "expected quotes around special characters. Use \"data.root='/x/year=2024'\""),
        ("+data.root=/x (a)", "expected quotes around special characters. Use \"+data.root='/x (a)'\""),
        ("data.root=/x[1]", "expected quotes around special characters. Use \"data.root='/x[1]'\""),
        ("data.root=/x/größe", "expected quotes around special characters. Use \"data.root='/x/größe'\""),
        ("data.root=x!", "expected quotes around special characters. Use 'data.root='\"'\"'x!'\"'\"''"),
        ("data.root='/x", "expected text that ends with its quote. Quote it as data.root=/x"),
        (
            "model.channels=[4,6",
            "expected a list or a mapping with closed brackets. Quote text: \"model.channels='[4,6'\"",
        ),
        ("foo", "expected key=value."),
        ("a b=1", "expected key=value."),
    ],
)
def test_invalid_override_says_how_to_quote(override, message):
    found, status = user_message(raised_by(composed, override))
    assert found == f"{override} is invalid: {message}"
    assert status == 2


def test_suggested_override_is_valid(tmp_path):
    """The suggestion, pasted into a shell, gives Hydra the text that was meant."""
    for text in ("/x/year=2024", "/My Drive (a)/[b]", "~x", "/größe", "a!b", "it's", "a#b"):
        found, _ = user_message(raised_by(composed, f"+data.root={text}"))
        words = subprocess.run(
            ["bash", "-c", f"printf %s {found.rpartition('Use ')[2]}"],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert composed(words.stdout).data.root == text


@pytest.mark.parametrize("value", ["${scale_lr:0.01,${data.batch_size}}", '${data.split_seed}="a" b\\'])
def test_suggested_override_keeps_interpolations(value):
    found, _ = user_message(raised_by(composed, f"optimizer.lr={value}"))
    words = shlex.split(found.rpartition("Use ")[2])
    assert OmegaConf.to_container(composed(*words).optimizer, resolve=False)["lr"] == value


def test_a_config_name_that_is_not_found():
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        found, status = user_message(raised_by(compose, "nonexist"))
    assert found == "--config-name=nonexist is invalid: expected train, or a .yaml file in the directory of -cd DIR."
    assert status == 2


def test_home_directory_is_spelled_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found, _ = user_message(raised_by(composed, "data.root=~/x"))
    assert found.endswith("expected a path without ~, which the shell does not expand here. Use data.root=/home/me/x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=8", "model.widht=8: key model.widht not found. Did you mean model.fc_width?"),
        (
            "trainer.fast_dev_run=true",
            "trainer.fast_dev_run=true: key trainer.fast_dev_run not found. Available: "
            "trainer._target_, trainer.accelerator, ",
        ),
        ("mdoel=lenet5", "mdoel=lenet5: key mdoel not found. Did you mean model?"),
        ("model/nrom=batch", "model/nrom=batch: key model/nrom not found. Did you mean model/norm?"),
        ("model/norm=layer", "model/norm=layer is invalid: expected one of: batch, lrn, "),
        (
            "augment=[crop_flip,cutuot]",
            "augment=cutuot is invalid: no such option. alexnet train --help lists those of ",
        ),
        ("scheduler=5", "A config group cannot be a number. To leave one out, put a tilde before its name, as in ~"),
        (
            "callbacks.mine={_target_:my.Callback}",
            "callbacks.mine={_target_:my.Callback}: key callbacks.mine not found. To add a key that conf/ does not "
            'define, use "+callbacks.mine={_target_:my.Callback}"',
        ),
        (
            "model.padding='a b'",
            "model.padding='a b': key model.padding not found. Did you mean model.pool2_padding? To add a key that "
            "conf/ does not define, use \"+model.padding='a b'\"",
        ),
        (
            "model=lenet5,cnn4",
            "model=lenet5,cnn4 is invalid: expected one value. To train every one of them, put -m before the "
            "overrides. A list needs brackets, model=[lenet5,cnn4], and text with commas needs quotes, "
            "\"model='lenet5,cnn4'\"",
        ),
        ("model=[lenet5,cnn4]", "model is invalid: expected one option, not several with a model/pool each. To train"),
        ("scheduler=null", "A config group cannot be null. To leave one out, put a tilde before its name, as in ~"),
    ],
)
def test_unknown_names_have_a_hint(override, message):
    found, status = user_message(raised_by(composed, override))
    assert found.startswith(message)
    assert status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nfc_widths: [${width}, 84]\n", " is invalid YAML in line 2: expected ',' or ']', but got '{'. Quote "),
        (
            "a: 1\n\tb: 2\n",
            r" is invalid YAML in line 2: found character '\t' that cannot start any token. Indent with",
        ),
        ("a: 1\nb: 1\na: 2\n", " is invalid YAML in line 3: found duplicate key a."),
        ("a: !!python/object:os.x {}\n", " is invalid YAML in line 1: could not determine a constructor for the tag"),
    ],
)
def test_a_file_that_is_not_yaml_is_one_line_with_the_place(text, message, tmp_path):
    (path := tmp_path / "own.yaml").write_text(text)
    found, status = user_message(raised_by(OmegaConf.load, path))
    assert found.startswith(f"{path}{message}")
    assert "\n" not in found
    assert status == 2


def test_a_character_that_yaml_forbids_is_one_line(tmp_path):
    (path := tmp_path / "own.yaml").write_text('a: "\x01"\n')
    found, status = user_message(raised_by(OmegaConf.load, path))
    assert found.startswith("unacceptable character #x0001: ")
    assert str(path) in found
    assert status == 2


def test_an_interpolation_without_its_end_has_the_words_of_its_cause(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("a: ${width\n")
    found, _ = user_message(raised_by(composed, f"hydra.searchpath=['{tmp_path}']", "model=own"))
    assert "'${width'" in found


def test_a_mapping_in_place_of_an_option_says_how_to_replace_it():
    override = "scheduler={_target_:torch.optim.lr_scheduler.StepLR,step_size:3}"
    found, _ = user_message(raised_by(composed, override))
    assert found.startswith(f"{override}: key scheduler.step_size not found, because the mapping is merged into")
    words = shlex.split(found.rpartition("To replace the option: ")[2])
    assert composed(*words).scheduler == {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}


def test_refused_arguments_of_a_constructor():
    error = raised_by(instantiate, {"_target_": "torch.nn.Linear", "in_features": 2, "wrong": 1})
    assert user_message(error) == (
        "Linear.__init__() got an unexpected keyword argument 'wrong' (for a traceback: HYDRA_FULL_ERROR=1)", 2,
    )  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_file_system(number):
    error = OSError(number, os.strerror(number), "/x/metrics.csv")
    verb = "accessed" if number == errno.EACCES else "written"  # reading may be forbidden as well
    assert user_message(error) == (f"/x/metrics.csv cannot be {verb}: {os.strerror(number)}.", 1)


@pytest.mark.parametrize(
    "key", ["data.root", *(pytest.param(key, marks=pytest.mark.slow) for key in ("run_dir", "init_from", "data_dir"))]
)
def test_a_name_that_is_too_long(key, tmp_path):
    overrides = ["data=cifar10", "model=lenet5", f"hydra.run.dir={tmp_path}/run", f"{key}={tmp_path}/{'n' * 256}"]
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_pl", "train", *overrides], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("File name too long.\n")
    assert done.stderr.count("\n") == 1


def test_the_section_of_a_refused_argument():
    error = raised_by(instantiate, {"augment": {"_target_": "torchvision.transforms.v2.RandomRotation"}})
    assert user_message(error)[0].startswith("augment: RandomRotation.__init__() missing 1 required positional")


# --- on the terminal ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from alexnet_pl.runtime.errors import ConfigError, one_line_errors
with one_line_errors():
    raise {"bug": ZeroDivisionError, "user": ConfigError}[sys.argv[1]]("lr=x is invalid")
"""


@pytest.mark.parametrize(
    ("kind", "environment", "status", "traceback"),
    [
        ("user", {}, 2, False),
        ("user", {"HYDRA_FULL_ERROR": "0"}, 2, False),
        ("user", {"HYDRA_FULL_ERROR": "1"}, 1, True),
        ("bug", {}, 1, True),
    ],
)
def test_exit_status_and_traceback(kind, environment, status, traceback):
    inherited = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == status
    assert ("Traceback" in done.stderr) == traceback
    if not traceback:
        assert done.stderr == "error: lr=x is invalid\n"


def test_environment_is_restored(monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with one_line_errors():
        assert os.environ["HYDRA_FULL_ERROR"] == "1"
        assert "HYDRA_FULL_ERROR" not in user_environment(os.environ)
    assert os.environ["HYDRA_FULL_ERROR"] == "0"
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise ConfigError("no")
    assert stopped.value.code == 2
    assert os.environ["HYDRA_FULL_ERROR"] == "0"
    assert capsys.readouterr().err == "error: no\n"


def test_exit_code_of_the_error(capsys):
    class LateError(UserError):
        exit_code = 1

    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise LateError("no")
    assert stopped.value.code == 1
