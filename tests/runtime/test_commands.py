"""Printed commands: what is pasted into a shell arrives in Hydra as it was meant."""

import json
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from alexnet_pl.runtime.commands import hydra_override, program, train_command

TEXTS = [
    "runs/2026-01-01_12-00-00", "runs/lr=0.01", "a=b=c", "My Drive/run (a)", "[a]", "{a: 1}", "a,b", "~/x", "a~b",
    "it's", "'", "''", 'say "x"', "back\\slash", "trail\\", "trail\\\\", "a\\'", "\\\\'b\\", "C:\\Users\\me", "C:/x",
    "$HOME", "${x}", "\\${x}", "\\\\${x}", "`id`", "$(id)", "!!", "a;b", "a|b", "a&b", "a*b?", "#a", "a:b", "%s", "@x",
    " lead", "trail ", "", "a\tb", "null", "true", "12", "1_000", "1e3", "-0.5", "nan", "+inf", "2024",
    "größe", "日本", "-x", "--help", "+a",
]  # fmt: skip


def through_hydra(override: str) -> object:
    """Return the value that a config gets from ``key=value``."""
    parsed = OverridesParser.create().parse_override(override)
    return OmegaConf.create({"key": parsed.value(), "x": "interpolated"}).key


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_hydra(text):
    assert through_hydra(hydra_override("key", text)) == text


@pytest.mark.parametrize("value", [1, -2, 0.5, 1e-05, 1e22, True, False, None])
def test_plain_values_keep_their_type(value):
    found = through_hydra(hydra_override("key", value))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_pasted_command_survives_shell_and_hydra(shell, tmp_path):
    """One shell call for all texts: each is the value of a key in a pasted train command."""
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.sh").write_text(train_command("-m", key=text) + "\n", encoding="utf-8")
    show = f"'{sys.executable}' -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    script = f'alexnet() {{ {show} "$@"; }}; for i in $(seq 0 {len(TEXTS) - 1}); do . ./$i.sh; done'
    done = subprocess.run([shell, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [through_hydra(words[-1]) for words in lines] == TEXTS
    assert {words[-2] for words in lines} == {"-m"}


def test_common_commands_are_easy_to_read(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/alexnet"])
    assert train_command(resume="runs/lenet5_digits/a-1") == "alexnet train resume=runs/lenet5_digits/a-1"
    assert train_command(resume="runs/lr=0.01") == "alexnet train \"resume='runs/lr=0.01'\""
    assert train_command("-m", **{"data.root": "/My Drive"}) == "alexnet train -m \"data.root='/My Drive'\""


def test_program_can_be_called_from_here(monkeypatch, tmp_path):
    (tmp_path / "train.py").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for argv0, words in {
        "train.py": ["python", "train.py"],
        str(tmp_path / "train.py"): ["python", "train.py"],
        "../repo/train.py": ["python", "../repo/train.py"],
        "/venv/bin/alexnet": ["alexnet", "train"],
        "/venv/lib/alexnet_pl/__main__.py": ["alexnet", "train"],
        "/venv/bin/pytest": ["alexnet", "train"],
        "-c": ["alexnet", "train"],
    }.items():
        monkeypatch.setattr(sys, "argv", [argv0])
        assert program() == words
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert program() == ["python", str(tmp_path / "train.py")]
