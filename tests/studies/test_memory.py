"""Memory of a study: trials leave nothing behind, so that the hundredth has as much room as the first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

COUNT = f"""
import gc, json, runpy, sys
from pathlib import Path
import alexnet_pl.studies.runner as runner

real, counts = runner.collect_garbage, []

def collect_garbage():
    real()
    counts.append(len(gc.get_objects()))
    Path("counts.json").write_text(json.dumps(counts))

runner.collect_garbage = collect_garbage
sys.argv[0] = {str(REPOSITORY / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_trials_leave_no_objects_behind(tmp_path: Path):
    """Bound the growth from the third trial on, with figures and TensorBoard's graph of the network.

    Hydra's job returns and torch.jit's registry once kept 1,460 objects and 2.3 MB per trial. What is left is 13
    objects, which Hydra keeps.
    """
    study = (
        "-m",
        "study=s",
        "model=lenet5",
        "data=digits",
        "trainer=smoke",
        "trainer.accelerator=cpu",
        "seed=1,2,3,4,5,6",
    )
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *study],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert len(counts) == 6
    growth = [after - before for before, after in zip(counts[2:], counts[3:], strict=False)]
    assert max(growth) < 100, counts
