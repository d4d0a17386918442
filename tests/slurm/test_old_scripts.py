"""Job scripts that an earlier version of launch wrote and that still wait in SLURM's queue."""

from __future__ import annotations

import re

import pytest
from conftest import record
from slurm.scripts import PRINT_CONTEXT, START_LATER, printed, submit, wait_for_end, write

pytestmark = pytest.mark.slow


def test_a_script_that_calls_launch_job_still_runs_its_run(slurm, slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, START_LATER)
    slurm.run("scancel", job)
    slurm.wait(job)
    script = run / "submissions/1/job.sh"
    text = script.read_text()
    assert "-m launch.execute.node_process " in text
    # Before the new layout the script called launch.job. Without --begin the job starts at once.
    script.write_text(re.sub(r"#SBATCH --begin=.*\n", "", text.replace("-m launch.execute.node_process ", "-m launch.job ")))
    resubmitted = slurm.run("sbatch", "--parsable", str(script)).strip()
    wait_for_end(run)
    assert slurm.wait(resubmitted)["JobState"] == "COMPLETED"
    assert record(run)["attempt"] == 1 and printed(run)["argv"] == []
