"""The script of a SLURM job, as text."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Wanted, slurm_resources
from launch.cluster.times import seconds, slurm_time
from launch.plan.job_script import FORBIDDEN_OPTIONS, Job, Request, make_job, srun_args
from trainers.contract.errors import UserError


def job(cluster: dict = {}, gpus: int | None = 1, nodes: int | None = None, procs: int | None = None, folder: str = "/runs/r/s/1",
        grace_s: float = 60, request: dict = {}, **more) -> Job:
    config = ClusterConfig(name="lab", kind="slurm", **cluster)
    resources = slurm_resources(config, Wanted(gpus if procs is None else None, procs, nodes))
    return make_job(Request(config, **request), resources, name="job", folder=folder, python="/venv/python", grace_s=grace_s,
                    **more)


def options(job: Job) -> dict[str, str | bool]:
    """Return the options that sbatch reads in the script."""
    words = [shlex.split(line)[1].removeprefix("--") for line in job.script.splitlines() if line.startswith("#SBATCH ")]
    return {key: value if equals else True for key, equals, value in (word.partition("=") for word in words)}


def command(job: Job) -> list[str]:
    """Return the words of the script's srun line."""
    (line,) = [line for line in job.script.splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_the_whole_script():
    cluster = {"partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100|h100", "gpus_per_node": 8,
               "cpus_per_gpu": 6, "mem_per_gpu": "64G", "time": "12h", "setup": ["module load cuda"], "data": "/a b",
               "sbatch": {"switches": "1", "exclusive": True, "overcommit": False}}
    made = job(cluster, gpus=16, code="/runs/r/code/c d")
    expected = {"partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100|h100", "gpus-per-node": "8",
               "cpus-per-task": "48", "mem": "512G", "time": "0-12:00:00", "switches": "1", "exclusive": True, "job-name": "job",
               "nodes": "2", "ntasks-per-node": "1", "requeue": True, "open-mode": "append", "signal": "USR2@105",
               "output": "/runs/r/s/1/%j_0_log.out"}
    assert options(made) == expected
    assert command(made) == ["srun", "--unbuffered", "--output", "/runs/r/s/1/%j_%t_log.out", "--nodes=2", "--ntasks-per-node=1",
                             "--cpus-per-task=48", "--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=0", "--wait=30",
                             "--export=ALL", "/venv/python", "-P", "-u", "-m", "launch.execute.node_process", "/runs/r/s/1"]
    lines = made.script.splitlines()
    start = lines.index("export SLURM_EXPORT_ENV=ALL")
    assert lines[start + 1:start + 4] == ["export LAUNCH_DATA='/a b'", "module load cuda",
                                          "export LAUNCH_CODE='/runs/r/code/c d'\"${LAUNCH_CODE:+:$LAUNCH_CODE}\""]
    assert made.command == ("sbatch", "--parsable", "--hold", "/runs/r/s/1/job.sh") and made.links == 1
    assert made == job(cluster, gpus=16, code="/runs/r/code/c d")


def test_the_signal_before_the_time_limit_is_ours(monkeypatch):
    """submitit takes its signal from SUBMITIT_PREEMPT_SIGNAL when it is imported."""
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJobEnvironment.USR_SIG", "USR1")
    assert options(job())["signal"] == "USR2@105" and "USR1" not in job().script


@pytest.mark.parametrize("cluster, given, expected", [
    ({"gpu_type": "a100"}, {"gpus": 4}, {"gpus-per-node": "a100:4"}),
    ({"gpu_type": "a100", "gpu_request": "gres"}, {"gpus": 4}, {"gres": "gpu:a100:4"}),
    ({"gpu_request": "gres"}, {"gpus": 4, "nodes": 2}, {"gres": "gpu:2", "nodes": "2"}),
    ({"gpu_request": "gres", "sbatch": {"gres": "scratch:100"}}, {"gpus": 1}, {"gres": "gpu:1,scratch:100"}),
    ({"gpu_request": "none"}, {"gpus": 4}, {"gres": None, "gpus-per-node": None}),
    ({"cpus_per_rank": 3, "mem_per_cpu": "2G", "cpus_per_node": 6}, {"procs": 4},
     {"nodes": "2", "cpus-per-task": "6", "mem-per-cpu": "2G", "gpus-per-node": None, "gres": None}),
    ({}, {"gpus": 1}, {"cpus-per-task": None, "mem": None, "partition": None, "account": None}),
    ({"mem_per_gpu": "512M", "mem_per_cpu": "2G"}, {"gpus": 2}, {"mem": "1024M", "mem-per-cpu": None}),
    ({"requeue": False}, {"gpus": 1}, {"no-requeue": True, "requeue": None}),
    ({"partition": "a", "time": "1h"}, {"request": {"time": "30", "options": {"partition": "b", "mail_type": "END"}}},
     {"partition": "b", "time": "0-00:30:00", "mail-type": "END"}),
    ({"sbatch": {"exclusive": True}}, {"request": {"options": {"exclusive": False}}}, {"exclusive": None}),
    ({}, {"request": {"options": {"job-name": "mine"}}}, {"job-name": "mine"}),
    ({}, {"request": {"after": ["7", "8"]}}, {"dependency": "afterok:7?afterok:8"}),
    ({}, {"request": {"options": {"dependency": "singleton"}}}, {"dependency": "singleton"}),
    ({}, {"request": {"after": ["7"], "options": {"dependency": "singleton"}}}, {"dependency": "afterok:7,singleton"}),
    ({}, {"grace_s": 0.5}, {"signal": "USR2@46"}),
])
def test_options_of_sbatch(cluster, given, expected):
    found = options(job(cluster, **given))
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("key", [*FORBIDDEN_OPTIONS, "ntasks_per_node", "out", "arr", "sig"])
@pytest.mark.parametrize("cluster", [True, False])
def test_options_that_launch_decides_cannot_be_set(key, cluster):
    with pytest.raises(UserError, match="cannot be set\nhint: .+"):
        job({"sbatch": {key: "1"}}) if cluster else job(request={"options": {key: "1"}})


@pytest.mark.parametrize("key", ["p", "", "N", "two\nlines", "mem #", "-mem", "mem=1 --wrap"])
def test_a_word_that_is_not_an_option_is_refused(key):
    with pytest.raises(UserError, match="is not an option of sbatch"):
        job(request={"options": {key: "1"}})


@pytest.mark.parametrize("value", ["two\nlines", "a\rb", "\x00", "\x1b[31m", "\u2028", "\x85", "\udc80", "\ue000"])
def test_text_that_an_sbatch_line_cannot_contain_is_refused(value):
    with pytest.raises(UserError, match="`comment` is .* which contains a line break or control character"):
        job(request={"options": {"comment": value}})
    with pytest.raises(UserError, match="the run directory's path"):
        job(folder=f"/runs/{value}/1")


@pytest.mark.parametrize("value", ["it's", '"', "$(id)", "`id`", "a;b & c", "%j", "中文　字 é", "👩‍🔬", "back\\slash\\", "a,b",
                                   "# no"])
def test_a_value_arrives_unchanged(value):
    """sbatch reads a backslash as an escape, even inside single quotes."""
    made = job({"sbatch": {"comment": value}})
    assert options(made)["comment"] == value.replace("\\", "\\\\") and made.script.count("#SBATCH --comment=") == 1


@pytest.mark.parametrize("folder, sbatch, srun", [
    ("/a b/it's", "/a b/it's/%j_0_log.out", "/a b/it's/%j_%t_log.out"),
    ("/100% %j %A", "/100%% %%j %%A/%j_0_log.out", "/100%% %%j %%A/%j_%t_log.out"),
    ("/%t", "/%%t/%j_0_log.out", "/%%t/%j_%t_log.out"),
])
def test_a_percent_sign_in_the_folder(folder, sbatch, srun):
    made = job(folder=folder)
    assert options(made)["output"] == sbatch and command(made)[3] == srun and command(made)[-1] == folder
    array = job(folder=folder, elements=[0, 1])
    assert options(array)["output"] == sbatch.replace("%j_0_", "%A_%a_0_")
    assert command(array)[3] == srun.replace("%j_%t_", "%A_%a_%t_") and command(array)[-1] == folder


@pytest.mark.parametrize("folder", ["/a\\b", "/my%20folder", "/%j/%t", "/%%u"])
def test_a_folder_that_srun_cannot_handle_is_refused(folder):
    with pytest.raises(UserError, match="contains a character that srun cannot handle"):
        job(folder=folder)


@pytest.mark.parametrize("elements, parallel, text", [
    ([0, 1, 2, 5], None, "0-2,5"), ([3], None, "3"), (range(1000), 20, "0-999%20"), ([1, 3, 4], 1, "1,3-4%1")])
def test_arrays(elements, parallel, text):
    made = job(elements=elements, parallel=parallel)
    assert options(made)["array"] == text and made.elements == tuple(elements) and made.links == 1


def test_a_chain_has_as_many_links_as_the_clusters_file_says():
    assert job({"requeue": False}).links == 4 and job({"requeue": False, "chain": 9}).links == 9
    assert job({"chain": 9}).links == 1 and job({"requeue": False}, elements=[0]).links == 1


@pytest.mark.parametrize("time, grace_s", [("1m", 60), ("105s", 60), ("10m", 600)])
def test_a_time_limit_that_leaves_no_time_for_training_is_refused(time, grace_s):
    with pytest.raises(UserError, match=r"the time limit is \d+ s, but the last \d+ s are reserved .* \(run.grace_s is"):
        job(request={"time": time}, grace_s=grace_s)
    assert options(job(request={"time": "106s"}))["time"] == "0-00:01:46"


@pytest.mark.parametrize("total_s, text", [(1, "0-00:00:01"), (3600, "0-01:00:00"), (90061, "1-01:01:01"),
                                           (864000, "10-00:00:00")])
def test_times_are_written_as_they_are_read(total_s, text):
    assert slurm_time(total_s) == text and seconds(text) == total_s


def test_in_a_users_allocation_all_cores_are_used():
    config = ClusterConfig(name="lab", kind="slurm", cpus_per_gpu=6, srun=["--label"])
    words = srun_args(config, slurm_resources(config, Wanted(gpus=4, nodes=2)), here=True)
    assert {"--nodes=2", "--overlap", "--cpu-bind=none", "--label"} <= set(words)
    assert not [word for word in words if word.startswith("--cpus-per-task")]


@pytest.fixture
def batch_shell(tmp_path: Path):
    """A function that runs a job's script, with scripts in place of srun, scontrol and sleep, in a folder with a hostile name.

    It returns the exit code, the standard output, the calls of scontrol that change something, and the folder.
    """
    folder, programs = tmp_path / "it's a $(touch hacked)", tmp_path / "bin"
    for path in (folder, programs):
        path.mkdir()

    def run(code: int, scontrol: str, marked: bool = True) -> tuple[int, str, list[str], Path]:
        (programs / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
        (programs / "sleep").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/pauses\n')
        (programs / "scontrol").write_text(f"#!/bin/sh\ncd {tmp_path}\n{scontrol}\n"
                                           'if [ "$1" = show ]; then echo "JobId=9 Restarts=${restarts:-2} BatchFlag=1"\n'
                                           'else echo "$@" >> calls; fi\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        (folder / "exclude-9_3").write_text("n1,n4")
        if marked:
            (folder / "requeue-9_3-2").touch()
        script = tmp_path / "job.sh"
        script.write_text(job(folder=str(folder)).script)
        env = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3",
               "SLURM_RESTART_COUNT": "2"}
        done = subprocess.run(["bash", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20)
        assert done.stderr == "" and not (tmp_path / "hacked").exists()
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, done.stdout, calls, folder

    return run


@pytest.mark.parametrize("code", [0, 1, 75])
@pytest.mark.parametrize("marked, restarts, requeued", [(True, 2, True), (False, 2, False), (True, 3, False)])
def test_the_batch_shell_requeues_a_marked_job(batch_shell, code, marked, restarts, requeued):
    """A job that SLURM itself has restarted is left alone."""
    exit_code, _, calls, folder = batch_shell(code, f"restarts={restarts}", marked)
    assert exit_code == code
    assert ("requeue 9_3" in calls) == ("update JobId=9_3 ExcNodeList=n1,n4" in calls) == requeued
    assert (folder / f"again-9_3-2-{code}").exists() == requeued


@pytest.mark.parametrize("code, shown", [(76, 75), (140, 140)])
def test_the_batch_shell_requeues_a_job_whose_head_says_so_or_was_ended_by_the_warning_as_it_started(batch_shell, code, shown):
    """The head may be unable to write the flag: a full disk."""
    exit_code, _, calls, _ = batch_shell(code, "", marked=False)
    assert exit_code == shown and calls[0] == "requeue 9_3"


@pytest.mark.parametrize("earlier, marked, requeued", [(4, False, True), (5, False, False), (5, True, True)])
def test_the_batch_shell_gives_up_if_the_job_is_too_short_to_start_a_node_process(batch_shell, tmp_path, earlier, marked,
                                                                                requeued):
    folder = tmp_path / "it's a $(touch hacked)"
    for restart in range(earlier):
        (folder / f"again-9_3-{restart}-140").touch()
    (folder / "again-9_2-0-140").touch()  # of another element
    exit_code, out, calls, _ = batch_shell(140, "", marked)
    assert exit_code == 140 and ("requeue 9_3" in calls) == requeued
    assert requeued or "job 9_3 is not requeued again" in out and "6 times; give the job more time with --time" in out


def test_the_batch_shell_requeues_the_job_once_slurms_controller_answers_again(batch_shell, tmp_path):
    away = 'echo x >> tries\n[ $(wc -l < tries) -gt 40 ] || { echo "Unable to contact slurm controller" >&2; exit 1; }'
    exit_code, out, calls, _ = batch_shell(75, away)
    pauses = [int(line) for line in (tmp_path / "pauses").read_text().splitlines()]
    assert exit_code == 75 and calls[0] == "requeue 9_3" and len(pauses) == 40
    assert pauses[:6] == [1, 2, 4, 8, 16, 16] and set(pauses[5:]) == {16}
    assert "job 9_3 cannot be requeued yet: Unable to contact slurm controller; trying again in 1 s" in out


def test_the_batch_shell_gives_up_if_slurm_refuses_to_requeue_the_job(batch_shell):
    exit_code, out, calls, _ = batch_shell(75, '[ "$1" = show ] || { echo "Requested operation is presently disabled"; exit 1; }')
    assert exit_code == 75 and calls == []
    assert out.splitlines()[-1] == "job 9_3 cannot be requeued: Requested operation is presently disabled"
