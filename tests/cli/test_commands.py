"""Command line: the table of commands, help without torch, messages for wrong input, arguments that all share."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from alexnet_pl.__main__ import COMMANDS, main
from alexnet_pl.cli.evaluate import CROPS
from alexnet_pl.cli.evaluate import main as evaluate_command
from alexnet_pl.data.shards.writer import PER_SHARD
from alexnet_pl.data.transforms import VIEW_NAMES
from alexnet_pl.runtime.errors import UserError, one_line_errors


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment or None, encoding="utf-8"
    )


def test_importing_the_package_does_not_import_torch():
    code = "import sys, alexnet_pl; assert 'torch' not in sys.modules; assert 'load_run' in alexnet_pl.__all__"
    done = fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_help_lists_every_command_without_torch(arguments):
    done = fresh(
        f"import sys; from alexnet_pl.__main__ import main; main({arguments!r})\n"
        "assert not {'torch', 'lightning', 'hydra', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    for name, text in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in done.stdout.splitlines())


@pytest.mark.parametrize("arguments", [["--help"], ["claims"]])
def test_a_reader_that_has_gone_ends_the_command_without_a_traceback(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "alexnet_pl", *arguments], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_the_help_of_the_commands_needs_no_torch():
    done = fresh(
        "import contextlib, sys\n"
        "from alexnet_pl.__main__ import COMMANDS, main\n"
        "for name in COMMANDS.keys() - {'train'}:\n"  # Hydra's own help
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "loaded = {'torch', 'lightning', 'pandas', 'matplotlib', 'scipy'} & {*sys.modules}\n"
        "assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: alexnet ") == len(COMMANDS) - 1


def test_help_texts_name_the_values_of_modules_that_they_do_not_import(capsys):
    assert (1, *VIEW_NAMES) == CROPS
    with pytest.raises(SystemExit):
        main(["shards", "--help"])
    assert f"images per shard (default: {PER_SHARD})" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists_and_explains_itself(name, capsys):
    module = import_module(f"alexnet_pl.cli.{name}")
    assert callable(module.main)
    if name == "train":
        return  # Hydra's own
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: alexnet {name} ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evalute", "error: command evalute not found. Did you mean evaluate?"),
        ("tensorbord", "error: command tensorbord not found. Did you mean tensorboard?"),
        ("\x1b[2Jx", "error: command [2Jx not found. "),
    ],
)
def test_an_unknown_command_gets_a_suggestion(name, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_commands_fail_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        evaluate_command([str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["evaluate", "shards", "benchmark"])  # the help texts with characters beyond ASCII
def test_help_survives_an_ascii_locale(name):
    code = f"from alexnet_pl.__main__ import main; main([{name!r}, '--help'])"
    done = fresh(code, LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "RUN", "x.png", "--top", "0"], "0 is invalid: expected an integer of at least 1"),
        (["predict", "RUN", "x.png", "--top", "all"], "all is invalid: expected an integer of at least 1"),
        (["shards", "A", "B", "--quality", "101"], "101 is invalid: expected an integer from 1 to 100"),
        (["shards", "B"], "TREE and OUT are required"),
        (["shards", "--verify", "A", "B"], "--verify takes the shard directory only"),
        (["benchmark", "--repeats", "0"], "0 is invalid: expected an integer of at least 1"),
        (["benchmark", "--load", "--full"], "--load excludes --full"),
        (["benchmark", "--growth", "--repeats", "2"], "--growth excludes --repeats"),
        (["benchmark", "--device", "cuda", "--compile", "default"], "--device cuda excludes --compile and --full"),
        (["serve", "RUN", "--port", "70000"], "70000 is invalid: expected a number from 1 to 65535"),
        (["tensorboard", "--port", "-1"], "-1 is invalid: expected a number from 1 to 65535"),
        (["export", "RUN", "--format", "onnx", "--out", "."], ". is invalid: expected a file, and it is a directory"),
        (["card", "RUN", "--out", "."], ". is invalid: expected a file, and it is a directory"),
        (["evaluate", "RUN", "--predictions", "nowhere/x.csv"], "its directory does not exist"),
        (["evaluate", "RUN", "--data", "cifar10_c", "DIR", "--data-root", "X"], "excludes --data-root"),
        (["study", "A", "B", "C"], "give one study, or two to compare"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_learning_curves_are_named_by_equals_unless_the_path_exists(tmp_path):
    from alexnet_pl.cli.figures import named_run

    run = tmp_path / "lr=0.01"
    run.mkdir()
    assert named_run(str(run)) == ("", run)
    assert named_run(f"slow={tmp_path}") == ("slow", tmp_path)
    assert named_run(f"a=b={run}") == ("a=b", run)


def test_every_run_has_a_name_in_the_legend(tmp_path: Path):
    """Issue: of lenet/seed1 and alexnet/seed1 only the second was drawn, without a message."""
    from alexnet_pl.cli.figures import by_name

    first, second = tmp_path / "lenet" / "seed1", tmp_path / "alexnet" / "seed1"
    assert by_name([("", first), ("", second)]) == {str(first): first, str(second): second}
    assert by_name([("a", first), ("", tmp_path / "seed2")]) == {"a": first, "seed2": tmp_path / "seed2"}
    with pytest.raises(UserError, match="^a is invalid: expected a name of its own for each run"):
        by_name([("a", first), ("a", second)])


def test_the_list_of_claims_says_where_nothing_has_been_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["claims"])
    assert f"{tmp_path / 'multirun'} has no studies. Run the command in a checkout" in capsys.readouterr().out
    (tmp_path / "multirun" / "study").mkdir(parents=True)
    (tmp_path / "multirun" / "study" / "study.json").touch()
    main(["claims"])
    assert "has no studies" not in capsys.readouterr().out
