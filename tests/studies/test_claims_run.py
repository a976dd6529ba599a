"""Runner of the ledger: which studies, in which order, by which workers, and every way to stop it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults.processes import wait_for

from alexnet_pl.cli.claims import main
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.studies.claims import load_claims
from alexnet_pl.studies.claims_run import Job, Pool, estimate_costs, jobs_of
from alexnet_pl.studies.store import Study
from studies.test_claims import CLAIMS
from studies.test_claims_evidence import claim

# --- what to run ----------------------------------------------------------------------------------------------------


def test_claims_share_a_study_with_the_most_seeds_of_any():
    claims = [claim(), claim(id="b", seeds={"lab": 5}), claim(id="c", experiment="other", seeds={"own": 2})]
    norms, other = jobs_of(claims, "lab", ["data.root=DIR"])
    assert (norms.name, norms.claims) == ("norms-lab", ["a", "b"])
    assert norms.overrides == [
        "experiment=norms", "scale=lab", "study=norms-lab", "seed=1,2,3,4,5", "callbacks.dashboard.figures=false",
        "data.root=DIR",
    ]  # fmt: skip
    assert (other.name, other.overrides[:2]) == ("other", ["experiment=other", "study=other"])
    assert [job.name for job in jobs_of(claims, "full")] == ["other"]
    assert [job.overrides[3] for job in jobs_of(claims[:1], "lab", most_seeds=2)] == ["seed=1,2"]


@pytest.mark.parametrize(
    ("override", "is_rehearsal"),
    [("trainer.max_epochs=1", True), ("data=digits", True), ("~augment", True), ("hydra.launcher.n_jobs=2", False),
     ("trainer.accelerator=cpu", False), ("++data.root=x", False)],
)  # fmt: skip
def test_overrides_that_change_numbers_make_a_rehearsal(override, is_rehearsal):
    (job,) = jobs_of([claim()], "lab", [override])
    assert job.name == ("rehearsal-norms-lab" if is_rehearsal else "norms-lab")
    assert f"study={job.name}" in job.overrides


def test_studies_run_in_order_of_cost():
    claims = load_claims(CLAIMS, ["relu_vs_tanh", "lrn_unit_scale", "weight_decay", "two_groups"])
    jobs = estimate_costs(jobs_of(claims, "lab"))
    seeds = {claim.study: claim.seeds.get("lab") or claim.seeds["own"] for claim in claims}
    per_seed = {job.name: job.trials / seeds[job.name.removesuffix("-lab")] for job in jobs}
    assert per_seed == {"norm_x_pool-lab": 6, "weight_decay-lab": 2, "two_towers-lab": 2, "relu_vs_tanh": 2}
    costs = [job.trials * job.cost for job in jobs]
    assert costs == sorted(costs)
    assert costs[0] > 0
    assert jobs[-1].name == "norm_x_pool-lab"
    full = {job.name: job.cost for job in estimate_costs(jobs_of(claims[2:], "full"))}
    lab = {job.name: job.cost for job in jobs}
    assert 3 < full["weight_decay-full"] / lab["weight_decay-lab"] < 6
    with pytest.raises(ConfigError, match=r"weight_decay: .*optimizer.lrr"):
        estimate_costs(jobs_of(claims[2:], "lab", ["optimizer.lrr=1"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no_such_claim"], "claim no_such_claim not found"),
        (["run", "lrn_alexnet", "--hours", "0"], "0 is invalid: expected a number of hours above 0"),
        (["run", "--scale", "tiny"], "invalid choice: 'tiny'"),
        (["run", "--workers", "0"], "0 is invalid: expected an integer of at least 1"),
        (["raport"], "unrecognized arguments: raport"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, capsys):
    with pytest.raises((SystemExit, ConfigError)) as error:
        main(arguments)
    assert message in capsys.readouterr().err + str(error.value)


def test_a_dry_run_prints_the_commands(capsys):
    main(["run", "tutorial_accuracy", "ten_crop", "--scale", "full", "--dry-run"])
    tenth, tutorial = capsys.readouterr().out.splitlines()
    assert tenth.startswith("   3 trials  alexnet train -m experiment=random_crops scale=full study=random_crops-full ")
    assert tutorial.startswith(
        "   5 trials  alexnet train -m experiment=tutorial scale=full study=tutorial-full seed=1,2,3,4,5 "
    )
    main(["run", "tutorial_accuracy"])
    assert capsys.readouterr().out == "None of these claims is tested at lab scale.\n"


# --- workers --------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from alexnet_pl.studies.store import Study

root = Path([word for word in sys.argv if word.startswith("hydra.sweep.dir=")][0].partition("=")[2])
study = Study(root)
trials = {f"000000000{n}": {"run_dir": f"t-000000000{n}", "overrides": {}, "choices": {}} for n in (1, 2)}
study.add("x", "basic", [], trials)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
for digits in trials:
    run_dir = study.run_dir(digits)
    run_dir.mkdir(exist_ok=True)
    if study.state(digits) == "finished":
        continue
    if study.state(digits) == "running":
        print(f"{run_dir.name} is in use", flush=True)
        continue
    with study.lock(digits):
        if study.run_dir(digits).joinpath("result.json").exists():  # as the runner does: finished in between
            continue
        with (root.parent / "started").open("a") as file:
            file.write(f"{root.name} {digits} {os.getpid()}\\n")
        while not (root.parent / "go").exists():
            assert os.getppid() != 1
            time.sleep(0.02)
        (run_dir / "result.json").write_text(json.dumps({"status": sys.argv[1]}))
print("study x: done", flush=True)
"""


def pool(
    multirun: Path, workers: int, status: str = "finished", seconds: float | None = None, lines: list | None = None
) -> Pool:
    """Return a pool whose workers hold the locks of two trials per study and wait for the file ``go``."""
    multirun.mkdir(exist_ok=True)
    jobs = [Job(name, [], ["c"], 2) for name in ("a", "b")]
    command = (sys.executable, "-c", WORKER, status)
    return Pool(jobs, workers, seconds, multirun, command, (lines if lines is not None else []).append)


def started(multirun: Path) -> list[list[str]]:
    path = multirun / "started"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_two_workers_share_the_trials_of_each_study(tmp_path):
    (tmp_path / "go").touch()
    lines: list[str] = []
    outcome = pool(tmp_path, 2, lines=lines).run()
    assert (outcome.received, outcome.is_time_up, outcome.failed) == (None, False, [])
    assert sorted(line[:2] for line in started(tmp_path)) == [[s, f"000000000{n}"] for s in "ab" for n in (1, 2)]
    assert "worker 1: study a (2 trials; claims: c)" in lines
    again = pool(tmp_path, 1)
    again.run()
    assert len(started(tmp_path)) == 4  # nothing runs twice


def test_failures_are_named_and_not_retried_for_ever(tmp_path):
    (tmp_path / "go").touch()
    assert pool(tmp_path, 1, status="failed").run().failed == ["a", "b"]


def test_the_end_of_the_time_stops_the_workers(tmp_path):
    outcome = pool(tmp_path, 2, seconds=0.0).run()
    assert outcome.is_time_up
    assert all(not Path(f"/proc/{pid}").exists() for *_, pid in started(tmp_path))


def test_a_signal_stops_the_workers_and_the_same_command_resumes(tmp_path):
    def send() -> None:
        wait_for(lambda: len(started(tmp_path)) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    outcome = pool(tmp_path, 2).run()
    thread.join()
    assert (outcome.received, outcome.failed) == (signal.SIGTERM, [])
    assert not any(_is_alive(int(pid)) for *_, pid in started(tmp_path))
    (tmp_path / "go").touch()
    assert pool(tmp_path, 2).run().failed == []
    assert len(started(tmp_path)) == 2 + 4


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_real_studies_survive_sigterm_and_sigkill(tmp_path):
    """Two trials of a rehearsal: stopped, then killed with its workers noticing, then finished by the same command."""
    command = [sys.executable, "-m", "alexnet_pl", "claims", "run", "ten_crop", "--seeds", "2", "data=digits",
               "--workers", "1", "trainer.max_epochs=2", "trainer.accelerator=cpu", "data.batch_size=16"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = tmp_path / "multirun" / "rehearsal-random_crops-lab"

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    process = start()
    wait_for(lambda: [*root.glob("*/metrics.csv")])
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "stopped; the same command resumes" in text
    ((first,),) = [[path.parent.parent for path in root.glob("*/checkpoints/latest.ckpt")]]
    process = start()
    wait_for(lambda: "start   from latest.ckpt" in (first / "train.log").read_text(encoding="utf-8"))
    process.kill()
    process.wait()
    study = Study(root)
    wait_for(lambda: not any(study.is_running(digits) for digits in study.trials))
    process = start()
    text = process.communicate()[0]
    assert process.returncode == 0, text
    results = [json.loads(path.read_text()) for path in root.glob("*/result.json")]
    assert [result["status"] for result in results] == ["finished"] * 2
    assert all("test/acc_ten_crop" in result for result in results)
