"""Submit runs to a real cluster.

The dry run shows what is submitted, names and values arrive unchanged, and jobs that cannot run are refused. The runs are
small scripts that import no large libraries.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BLOBS, Command, attempt, record, wait_until
from slurm.conftest import LoginCommand, write_cluster
from slurm.scripts import (
    HOSTILE,
    ON_TEST_CLUSTER,
    PRINT_CONTEXT,
    START_LATER,
    TORCHRUN,
    assert_nothing_submitted,
    printed,
    rank_log,
    submit,
    wait_for_end,
    write,
)

pytestmark = pytest.mark.slow  # each test is fast, the file is slow


# --- the dry run shows what is submitted


@pytest.mark.parametrize("cluster, args", [
    ({}, ["--gpus", 8]),
    ({}, ["--gpus", 16, "--time", "4h", "sbatch.exclusive=true"]),
    ({"requeue": False, "chain": 3}, ["--gpus", 2]),
    ({"gpu_request": "gres", "cpus_per_gpu": 2, "mem_per_gpu": "1G"}, ["--gpus", 4, "run.grace_s=20"]),
    ({"prefix": ["env", "A WORD=it's $HOME"], "setup": ["export COLOUR='dark blue'"], "srun": ["--label"]}, ["--procs", 2]),
], ids=["one node", "two nodes", "a chain", "gres", "a prefix"])
def test_the_dry_run_shows_what_is_submitted(slurm, slurm_launch, cluster, args):
    write(slurm_launch.folder, PRINT_CONTEXT)
    write_cluster(slurm_launch.folder, **cluster)
    args = ["work.py", *args, START_LATER]
    config = {"XDG_CONFIG_HOME": str(slurm_launch.folder / "config")}
    without_slurm = Command(slurm_launch.folder)(*args, *ON_TEST_CLUSTER, "--dry-run", PATH="/nonexistent", **config)
    assert without_slurm.returncode == 0, without_slurm.stderr
    text = slurm_launch(*args, *ON_TEST_CLUSTER, "--dry-run").stdout
    plan = json.loads(slurm_launch(*args, *ON_TEST_CLUSTER, "--dry-run", "--json").stdout)
    assert slurm_launch.runs() == []
    run, jobs = submit(slurm_launch, *args)

    def with_run_id(text: str) -> str:
        """Replace every run id of the dry runs by the id of this run."""
        return re.sub(r"work-\d{8}-\d{6}-\w{4}", run.name, text)

    assert with_run_id(without_slurm.stdout) == with_run_id(text)
    script = with_run_id(plan["job"]["script"])
    assert script in with_run_id(text) and shutil.which("sbatch")
    assert len(jobs) == plan["job"]["links"] == cluster.get("chain", 1)
    for job in jobs:
        assert slurm.try_run("scontrol", "write", "batch_script", job, "-").stdout == script
    for name, text in {**plan["files"], "submissions/1/job.sh": script}.items():
        assert (run / name).read_text() == with_run_id(text)


# --- names and values arrive unchanged


@pytest.mark.slow
def test_hostile_words_arrive_and_execute_nothing(slurm, slurm_launch):
    """Also after a node process was killed: the batch shell then requeues the job without that node."""
    folder = slurm_launch.folder / HOSTILE
    folder.mkdir()
    write(folder, "import os\nif os.environ['LAUNCH_ATTEMPT'] == '1' and os.environ['RANK'] == '0':\n"
                  "    os.kill(os.getppid(), 9)\n" + PRINT_CONTEXT, f"{HOSTILE}.py")
    write_cluster(folder, env={"OF_CLUSTER": HOSTILE}, data=HOSTILE, sbatch={"comment": f"{HOSTILE}\\n\\"})
    words = [HOSTILE, "back\\slash\\", "", "two\nlines", "-x", "--", " blanks ", "\t"]
    run, (job,) = submit(LoginCommand(folder, slurm), f"{HOSTILE}.py", "--procs", 2, "--nodes", 2,
                         f"sbatch.job-name={HOSTILE}\\j", "--", *words, OF_USER=f"{HOSTILE}\\\n")
    slurm.wait_until_requeued(job)
    assert slurm.run("squeue", "-h", "-o", "%k", "-j", job) == f"{HOSTILE}\\n\\\n"
    slurm.start_now(job)
    wait_for_end(run)
    for rank in (0, 1):
        context = printed(run, rank, number=2)
        assert context["argv"] == words and context["cwd"] == str(folder)
        assert context["env"]["OF_USER"] == f"{HOSTILE}\\\n"
        assert context["env"]["OF_CLUSTER"] == context["env"]["LAUNCH_DATA"] == HOSTILE
        assert context["env"]["SLURM_JOB_NAME"] == f"{HOSTILE}\\j"
    assert attempt(run, 1)["nodes"][0] not in attempt(run, 2)["nodes"]
    assert [path.name for path in sorted((run / "submissions/1").glob("*.out"))] == [f"{job}_{n}_log.out" for n in (0, 1)]
    assert not [*slurm_launch.folder.rglob("hacked"), *slurm.folder.rglob("hacked"), *Path.cwd().glob("hacked")]


def test_a_failed_node_is_excluded_in_addition_to_those_that_the_user_excludes(start_cluster, slurm_launch):
    write(slurm_launch.folder, "import os, time\nif os.environ['RANK'] == '0':\n    os.kill(os.getppid(), 9)\ntime.sleep(60)\n")
    slurm = start_cluster(nodes=4)
    run, (job,) = submit(LoginCommand(slurm_launch.folder, slurm), "work.py", "--procs", 2, "--nodes", 2, "sbatch.exclude=n1")
    slurm.wait_until_requeued(job)
    wait_until(lambda: slurm.job(job)["ExcNodeList"] == "n1,n2")
    assert attempt(run, 1)["nodes"] == ["n2", "n3"]


@pytest.mark.parametrize("name", ["100% of %%", "%N%j"])
def test_percent_signs_in_the_folder_of_runs(slurm, slurm_launch, name):
    """srun replaces some of them in the names of output files."""
    write(slurm_launch.folder, PRINT_CONTEXT)
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 2, "--nodes", 2, "--runs", name)
    wait_for_end(run)
    assert run.parent == slurm_launch.folder / name and printed(run, 1)["env"]["LAUNCH_RUN_DIR"] == str(run)
    assert {path.name for path in (run / "submissions/1").glob("*.out")} == {f"{job}_0_log.out", f"{job}_1_log.out"}


@pytest.mark.parametrize("where", ["command line", "cluster"])
def test_a_line_break_in_a_job_name_is_refused(slurm_launch, where):
    write(slurm_launch.folder, PRINT_CONTEXT)
    name = "two\ntouch hacked"
    write_cluster(slurm_launch.folder, sbatch={"job-name": name} if where == "cluster" else {})
    given = [f"sbatch.job-name={name}"] if where == "command line" else []
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, *given)
    assert done.returncode == 2 and "`job-name` is 'two\\ntouch hacked', which contains a line break" in done.stderr
    assert_nothing_submitted(slurm_launch)


def test_a_line_break_in_the_name_of_an_option_is_refused(slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, "sbatch.comment=x\ntouch hacked", "sbatch.x\ntouch hacked #=1")
    assert done.returncode == 2 and "is not an option of sbatch" in done.stderr
    assert_nothing_submitted(slurm_launch)


@pytest.mark.parametrize("name", ["a\\b", "two\nlines", "my%20folder", "%j%t"])
def test_a_folder_of_runs_that_srun_cannot_handle_is_refused(slurm_launch, name):
    write(slurm_launch.folder, PRINT_CONTEXT)
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, "--runs", name)
    assert done.returncode == 2 and "that srun cannot handle" in done.stderr and "--runs DIR" in done.stderr
    assert not (slurm_launch.folder / name).exists()
    assert_nothing_submitted(slurm_launch)


# --- jobs that cannot run are refused


# Each value: arguments, keys of the cluster file, environment variables, and a pattern of the error.
REFUSED = {
    "partition": (["sbatch.partition=nope"], {}, {},
                  "refuses this job: invalid partition .*nope.*\nhint: the partitions are main, short, urgent"),
    "partition misspelt": (["sbatch.partition=mian"], {}, {}, "did you mean sbatch.partition=main?"),
    "GPU type": (["--gpus", 2], {"gpu_type": "a100"}, {}, "not available\n.*gpus-per-node=a100:2, .*main.* 8 GPU"),
    "GPU type by gres": (["--gpus", 2], {"gpu_type": "a100", "gpu_request": "gres"}, {}, "not available\n.*gres=gpu:a100:2"),
    "more GPUs than a node has": (["--gpus", 16], {"gpus_per_node": 16}, {}, "not available\n.*gpus-per-node=16.*8 GPU"),
    "more nodes than the cluster has": (["--gpus", 32], {}, {}, "not available\n.*nodes=4, .*3 node"),
    "more cores than a node has": (["--procs", 17], {}, {}, "not .*available\n.*cpus-per-task=17; .*16 cores"),
    "more memory than a node has": (["--procs", 1, "sbatch.mem=900G"], {}, {}, "not .*available\n.*mem=900G; .*62 GiB"),
    "constraint": (["sbatch.constraint=nope"], {}, {}, "Invalid feature specification\n.*constraint=nope"),
    "the partition's time": (["sbatch.partition=short", "--time", "10m"], {}, {},
                             "the time limit is 0-00:10:00; partition `short` allows 0-00:03:00\n"),
    "any partition's time": (["sbatch.partition=short,main", "--time", "2d"], {}, {}, "partition `main` allows 1-00:00:00\n"),
    "a time limit below the grace": (["--time", "1m"], {}, {}, "the time limit is 60 s, but the last 105 s are reserved"),
    "a malformed time": (["--time", "soon"], {}, {}, "--time is `soon`, which must be a time such as"),
    "GPUs not divisible by nodes": (["--gpus", 3, "--nodes", 2], {}, {}, "cannot be spread evenly over 2 nodes\n.*--gpus 2 or 4"),
    "an option that launch sets": (["sbatch.output=x"], {}, {}, "`output` cannot be set\n.*launch logs"),
    "an abbreviated option that launch sets": (["sbatch.arr=0-3"], {}, {}, "`array` cannot be set\n.*sweep"),
    "a short option": (["sbatch.p=short"], {}, {}, "'p' is not an option of sbatch\n.*long name"),
    "an unknown option": (["sbatch.nonsense=1"], {}, {}, "unrecognized option '--nonsense=1'"),
    "no SLURM": ([], {}, {"PATH": "/nonexistent", "SLURM_CONF": ""}, "there is no SLURM here: `sbatch` is not installed"),
    "no slurm.conf": ([], {}, {"SLURM_CONF": ""}, "configuration source\n.*check that SLURM_CONF is right"),
    "a missing SLURM_CONF": ([], {}, {"SLURM_CONF": "/nonexistent/slurm.conf"}, "SLURM_CONF is `/nonexistent/slurm.conf`"),
    "no allocation": (["--here"], {}, {}, "--here needs an allocation, and this shell is not in one"),
    "no run to wait for": (["--after", "nope"], {}, {}, "there is no run `nope`"),
    "a debugger": (["--debug"], {}, {}, "--debug runs one rank in this process, not on SLURM"),
}


@pytest.mark.parametrize("args, cluster, env, error", REFUSED.values(), ids=REFUSED)
def test_a_job_that_cannot_run_is_refused(slurm_launch, args, cluster, env, error):
    if "configuration source" in error and Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this host is part of a real cluster")
    write(slurm_launch.folder, PRINT_CONTEXT)
    write_cluster(slurm_launch.folder, **cluster)
    started = time.monotonic()
    done = slurm_launch("work.py", *ON_TEST_CLUSTER, *args, **env)
    assert time.monotonic() - started < 30
    assert done.returncode == 2 and re.search(error, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) <= 2 and done.stdout == ""
    assert_nothing_submitted(slurm_launch)


@pytest.mark.parametrize("args, error", [
    (["--nodes", 2], "`--nodes` is for SLURM"), (["--time", "1h"], "`--time` is for SLURM"),
    (["--follow"], "`--follow` is for SLURM"), (["sbatch.mem=1G"], "`sbatch.mem` is for SLURM"),
    (["--slurm", "--cluster", "local"], "`local` is not a SLURM cluster"), (["--cluster", "nope"], "there is no cluster `nope`"),
])
def test_options_for_slurm_are_refused_without_slurm(slurm_launch, args, error):
    write(slurm_launch.folder, PRINT_CONTEXT)
    done = slurm_launch("work.py", *args)
    assert done.returncode == 2 and error in done.stderr and len(done.stderr.splitlines()) <= 2
    assert_nothing_submitted(slurm_launch)


def test_launch_leaves_it_to_slurm_to_refuse_an_account(slurm, slurm_launch):
    """This cluster has no accounting, so SLURM accepts any account."""
    write(slurm_launch.folder, PRINT_CONTEXT)
    _, (job,) = submit(slurm_launch, "work.py", "sbatch.account=nobody", START_LATER)
    assert slurm.job(job)["Account"] == "nobody"


# --- environments that break launchers


# Variables that SLURM's commands, torchrun or launch read, with values that would change the job.
INHERITED = {
    "SBATCH_EXPORT": "NONE", "SBATCH_PARTITION": "short", "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-1",
    "SBATCH_NO_REQUEUE": "1", "SBATCH_JOB_NAME": "another", "SBATCH_SIGNAL": "USR1@10", "SBATCH_OPEN_MODE": "truncate",
    "SBATCH_GPUS": "3", "SBATCH_EXCLUSIVE": "1", "SLURM_EXPORT_ENV": "NONE", "SLURM_CPU_BIND": "map_cpu:99",
    "SLURM_MEM_PER_NODE": "10", "SBATCH_MEM_PER_NODE": "10", "SLURM_CPUS_PER_TASK": "3", "SLURM_NTASKS": "7",
    "SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "5", "SRUN_CPUS_PER_TASK": "9",
    "SLURM_GPUS_PER_NODE": "4", "SLURM_DISTRIBUTION": "plane=7", "SLURM_JOB_ID": "1", "SLURM_PROCID": "5",
    "SLURM_RESTART_COUNT": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "2", "CUDA_VISIBLE_DEVICES": "5",
    "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "9", "LOCAL_WORLD_SIZE": "9", "GROUP_RANK": "2", "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1", "LAUNCH_RUN_DIR": "/nowhere", "LAUNCH_ATTEMPT": "9", "OMP_NUM_THREADS": "7",
}
JOB = ("Partition", "TimeLimit", "Requeue", "NumNodes", "NumCPUs", "TresPerNode", "MinMemoryCPU", "OverSubscribe")


def comparable_values(slurm, run: Path, ranks: int) -> dict:
    """Wait for a run of PRINT_CONTEXT and return its values that must not depend on where and how it was submitted."""
    wait_for_end(run)
    assert record(run)["attempt"] == 1 and attempt(run, 1)["restart"] == 0
    job = slurm.wait(attempt(run, 1)["job"])  # before its end SLURM counts only the nodes that still hold the job
    keys = (*TORCHRUN, "OMP_NUM_THREADS", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND",
            "SLURM_GPUS_ON_NODE", "SLURM_ARRAY_TASK_ID", "SLURM_SUBMIT_DIR", "HOME")
    contexts = {rank: printed(run, rank) for rank in range(ranks)}
    assert all(context["env"]["LAUNCH_RUN_DIR"] == str(run) and context["env"]["SLURM_JOB_NAME"] == run.name
               and 20_000 <= int(context["env"]["MASTER_PORT"]) < 32_000 for context in contexts.values())
    return {"job": {key: job[key] for key in JOB},
            **{rank: [context["argv"], context["cwd"], len(context["env"]["CUDA_VISIBLE_DEVICES"].split(",")),
                      {key: context["env"].get(key) for key in keys}] for rank, context in contexts.items()}}


@pytest.mark.slow
def test_the_environment_of_the_submission_changes_nothing(slurm, slurm_launch):
    """Four submissions give the same job and ranks.

    One comes from a clean environment, one from an environment with INHERITED, one from another job's batch script, and one
    from a step of that job with CPU binding.
    """
    folder = slurm_launch.folder
    write(folder, PRINT_CONTEXT)
    args = ("work.py", "--gpus", 4, "--nodes", 2)
    expected = comparable_values(slurm, submit(slurm_launch, *args)[0], ranks=4)
    assert expected["job"] == {"Partition": "main", "TimeLimit": "00:30:00", "Requeue": "1", "NumNodes": "2", "NumCPUs": "4",
                               "TresPerNode": "gres:gpu:2", "MinMemoryCPU": "500M", "OverSubscribe": "OK"}
    *_, gpus, variables = expected[3]
    assert [variables[key] for key in TORCHRUN] == ["3", "4", "1", "2", "1", "2", "127.0.0.1"]
    assert gpus == 2 and variables["SLURM_ARRAY_TASK_ID"] is None

    assert comparable_values(slurm, submit(slurm_launch, *args, **INHERITED)[0], ranks=4) == expected

    line = " ".join([sys.executable, "-P", "-m", "launch", *map(str, args), *ON_TEST_CLUSTER])
    outer = write(folder, f"#!/bin/bash\nexport RANK=3 SBATCH_PARTITION=short\n{line}\nsrun -n1 -c2 {line}\n", "outer.sh")
    before = set(slurm_launch.runs())
    job = slurm.run("sbatch", "--parsable", "--partition=urgent", "--gpus-per-node=2", "-N1", "-n3", "-c2", "--no-requeue",
                    f"--output={folder}/outer.out", outer, cwd=folder, SBATCH_CPU_BIND="map_cpu:0", SLURM_CPU_BIND="none",
                    XDG_CONFIG_HOME=str(folder / "config")).strip()
    slurm.wait(job)
    runs = set(slurm_launch.runs()) - before
    assert len(runs) == 2, (folder / "outer.out").read_text()
    for run in runs:
        assert comparable_values(slurm, run, ranks=4) == expected


def test_in_an_allocation_with_cpu_binding(slurm, slurm_launch):
    folder = slurm_launch.folder
    write(folder, PRINT_CONTEXT)
    command = [sys.executable, "-P", "-m", "launch", "work.py", "--cluster", "here", "--here"]
    config = {"XDG_CONFIG_HOME": str(folder / "config"), "SLURM_CPU_BIND": "map_cpu:99", "SLURM_DISTRIBUTION": "plane=7"}
    allocate = ["salloc", "-Q", "-N2", "--gpus-per-node=2", "--gres-flags=disable-binding"]
    # From the shell of salloc, and from a job step, such as an interactive shell that holds the whole allocation.
    for prefix in ([], ["srun", "-N1", "-n1", "--gpus-per-node=2"]):
        done = slurm.try_run(*allocate, *prefix, *command, "--gpus", 4, "--nodes", 2, cwd=folder, **config)
        assert done.returncode == 0, done.stderr
        run = slurm_launch.runs()[-1]
        assert f"run {run.name} is finished" in done.stdout and record(run)["state"] == "finished"
        assert re.fullmatch(r"\d+\.\d+", record(run)["job"]["ids"][0]) and attempt(run, 1)["nodes"] == ["n1", "n2"]
        for rank in range(4):
            env = printed(run, rank)["env"]
            assert [env[key] for key in TORCHRUN] == [str(rank), "4", str(rank % 2), "2", str(rank // 2), "2", "127.0.0.1"]
            assert env["CUDA_VISIBLE_DEVICES"] == "0,1"

    earlier_runs = slurm_launch.runs()
    done = slurm.try_run("salloc", "-Q", "-N1", *command, "--procs", 2, "--nodes", 2, cwd=folder, **config)
    assert done.returncode == 2 and "srun could not start the run in allocation" in done.stderr
    assert slurm_launch.runs() == earlier_runs


def test_ctrl_c_in_an_allocation_stops_the_run_and_resume_submits_a_job(slurm, slurm_launch):
    write(slurm_launch.folder, "import os, time\nif os.environ['LAUNCH_ATTEMPT'] == '1': time.sleep(600)\n" + PRINT_CONTEXT)
    slurm.run("salloc", "-N2", "--no-shell")
    (allocation,) = slurm.run("squeue", "-h", "-o", "%A").split()
    process = slurm_launch.start("work.py", "--procs", 2, "--nodes", 2, *ON_TEST_CLUSTER, "--here", SLURM_JOB_ID=allocation)
    run = wait_until(slurm_launch.runs, process=process)[0]
    wait_until(lambda: (run / "attempts/1/logs/1.log").exists(), process=process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and f"run {run.name} is preempted; continue with `launch resume {run.name}`\n" in out
    assert (attempt(run, 1)["outcome"], attempt(run, 1)["reason"]) == ("preempted", "Ctrl-C")
    assert slurm.job(allocation)["JobState"] == "RUNNING"
    assert slurm_launch("resume", run.name).returncode == 0
    wait_for_end(run)
    assert attempt(run, 2)["job"] == record(run)["job"]["ids"][0] != allocation and attempt(run, 2)["nodes"] == ["n1", "n2"]


# --- ports


@pytest.mark.slow
def test_runs_submitted_at_the_same_time_never_share_a_port(slurm, slurm_launch):
    """Two runs of two ranks each start on one node, 20 times. Each rank runs until both runs listen on their ports."""
    tries = 20
    write(slurm_launch.folder, """
import os, socket, sys, time
from pathlib import Path
port, place, me = int(os.environ["MASTER_PORT"]), Path(sys.argv[1]), os.environ["LAUNCH_RUN_DIR"].rpartition("/")[2]
if os.environ["RANK"] == "0":
    store = socket.create_server(("", port))  # as rank 0's store does
    (place / me).write_text(str(port))
while len(list(place.iterdir())) < 2:
    time.sleep(0.02)
""")
    shared = retried = 0
    for number in range(tries):
        place = slurm_launch.folder / f"try{number}"
        place.mkdir()
        args = ("work.py", "--procs", 2, *ON_TEST_CLUSTER, "--json", "sbatch.nodelist=n1", "--", place)
        processes = [slurm_launch.start(*args) for _ in range(2)]
        outputs = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
        for output in outputs:
            wait_for_end(Path(output["path"]))
        ports = [(place / output["id"]).read_text() for output in outputs]
        shared += ports[0] == ports[1]
        retried += sum(record(Path(output["path"]))["attempt"] > 1 for output in outputs)
    print(f"{tries} tries: in {shared} both runs had the same port, {retried} runs needed a second attempt")
    assert shared == retried == 0


# --- how long it takes


def test_a_submission_and_a_large_dry_run_are_fast(slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    write_cluster(slurm_launch.folder, max_nodes=64)

    def measure(*args: object) -> tuple[float, float]:
        """Run `launch` and return (wall time, CPU time) in seconds. Other processes on the cores do not add to the CPU time."""
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = slurm_launch("work.py", *args, *ON_TEST_CLUSTER)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for name, args in {"from the command to the job id": ("--gpus", 8, START_LATER),
                       "--dry-run for 64 nodes": ("--gpus", 512, "--dry-run")}.items():
        wall_s, cpu_s = map(min, zip(*(measure(*args) for _ in range(3))))
        print(f"{name}: {wall_s:.2f} s, CPU time {cpu_s:.2f} s")
        assert wall_s < 10 and cpu_s < 2


# --- follow, resume, and runs that wait for another run


@pytest.mark.slow
def test_follow_shows_the_log_to_the_end(slurm_launch):
    """Also across a failed attempt and its retry."""
    write(slurm_launch.folder, "import os, time\nprint('one', flush=True)\ntime.sleep(1)\n"
                               "if os.environ['LAUNCH_ATTEMPT'] == '1': raise SystemExit('once')\nprint('two')\n")
    done = slurm_launch("work.py", "--procs", 1, "--slurm", "--follow", LAUNCH_CLUSTER="here")
    assert done.returncode == 0, done.stderr
    run = slurm_launch.run().name
    assert re.match(rf"run {run} submitted to here as job \d+: 1 CPU rank\(s\) on 1 node\(s\)\n", done.stdout)
    for word in ("status", "logs -f", "cancel"):
        assert f"launch {word} {run}\n" in done.stdout
    assert re.search(rf"\none\nonce\n--- attempt 2 ---\none\ntwo\nrun {run} is finished\n$", done.stdout)

    write(slurm_launch.folder, "raise SystemExit('it must fail')\n")
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, "--follow", "run.max_restarts=0")
    assert done.returncode == 1 and done.stdout.endswith(f"it must fail\nrun {slurm_launch.runs()[-1].name} is failed\n")


def test_ctrl_c_ends_follow_and_leaves_the_run_running(slurm_launch):
    write(slurm_launch.folder, "import os, time\nprint('one', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.05)\n")
    following = slurm_launch.start("work.py", "--procs", 1, *ON_TEST_CLUSTER, "--follow")
    for line in following.stdout:
        if line == "one\n":
            following.send_signal(signal.SIGINT)
            break
    out, err = following.communicate(timeout=120)
    run = slurm_launch.run()
    assert following.returncode == 0 and out == f"run {run.name} is running\n" and err == ""
    (slurm_launch.folder / "go").touch()
    wait_for_end(run)
    assert record(run)["attempt"] == 1


def test_resume_submits_with_the_same_options_as_before(slurm, slurm_launch):
    """Except for options that are given again."""
    write(slurm_launch.folder, "import time\ntime.sleep(600)\n")
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 2, "--nodes", 2, "--time", "10m", "sbatch.comment=then",
                         "sbatch.nice=5", START_LATER)
    fields = ("TimeLimit", "Comment", "Nice", "NumTasks", "NumCPUs")
    assert [slurm.job(job)[key] for key in fields] == ["00:10:00", "then ", "5", "2", "2"]
    for given, expected in [
        ([], ["00:10:00", "then ", "5", "2", "2"]),
        (["--time", "12m"], ["00:12:00", "then ", "5", "2", "2"]),
        (["sbatch.comment=now"], ["00:12:00", "now ", "5", "2", "2"]),
        (["--procs", 3, "--nodes", 1], ["00:12:00", "now ", "5", "1", "3"]),
    ]:
        assert slurm_launch("cancel", run.name).returncode == 0
        resumed = slurm_launch("resume", run.name, *given, "--json")
        assert resumed.returncode == 0, resumed.stderr
        (job,) = json.loads(resumed.stdout)["jobs"]
        assert [slurm.job(job)[key] for key in fields] == expected
    assert record(run)["job"] == {"kind": "slurm", "cluster": "here", "ids": [job], "submission": 5}


@pytest.mark.slow
def test_after_lets_a_run_wait_for_another_run(slurm, slurm_launch):
    folder = slurm_launch.folder
    write(folder, "import sys, time\nprint(time.time(), flush=True)\ntime.sleep(1)\nprint(time.time())\nsys.exit(sys.argv[1])\n"
                  .replace("sys.argv[1]", "int(sys.argv[1])"))
    first, (job,) = submit(slurm_launch, "work.py", "--procs", 1, "--", 0)
    second, (later,) = submit(slurm_launch, "work.py", "--procs", 1, "--after", first.name, "--", 0)
    assert slurm.job(later)["Dependency"].startswith(f"afterok:{job}")
    wait_for_end(second)
    assert float(rank_log(first).split()[1]) < float(rank_log(second).split()[0])
    third, (job,) = submit(slurm_launch, "work.py", "--procs", 1, "--after", second.name, "run.max_restarts=0", "--", 1)
    assert slurm.job(job)["Dependency"] == "(null)"  # the run to wait for has finished
    fourth, _ = submit(slurm_launch, "work.py", "--procs", 1, "--after", third.name, "--", 0)
    wait_for_end(third, "failed")
    wait_until(lambda: f"it waits for run {third.name}, which is failed" in slurm_launch("status", fourth.name).stdout)
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, "--after", third.name)
    assert done.returncode == 2 and f"run {third.name} is failed: nothing to wait for" in done.stderr


# --- the code as it was at submission


def test_a_queued_script_runs_with_the_code_of_its_submission(slurm, slurm_launch):
    folder = slurm_launch.folder
    write(folder, "import mine\nprint('the script', 'then', mine.WORD)\n")
    write(folder, "WORD = 'then'\n", "mine.py")
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, START_LATER)
    write(folder, "raise SystemExit('edited')\n")
    write(folder, "WORD = 'now'\n", "mine.py")
    slurm.start_now(job)
    wait_for_end(run)
    assert rank_log(run) == "the script then then\n"
    write(folder, "print('new')\n")
    assert slurm_launch("work.py", "--procs", 1).stdout.count("new\n") == 1  # a run on this machine uses the code as it is now


def test_resume_after_a_fix_uses_the_code_and_the_clusters_file_as_they_are(slurm, slurm_launch):
    """A file that a rank has written beside its script stays, and the older copy of the code is kept."""
    folder = slurm_launch.folder
    write(folder, "from pathlib import Path\nimport sys\nkept = Path(__file__).with_name('kept')\nprint(kept.exists())\n"
                  "kept.touch()\nimport mine\n")
    write(folder, "raise ValueError('a mistake')\n", "mine.py")
    write_cluster(folder, setup=["export WORD=wrong"])
    run, _ = submit(slurm_launch, "work.py", "--procs", 1, "run.max_restarts=0")
    wait_for_end(run, "failed")
    write(folder, "import os\nprint('fixed', os.environ['WORD'])\n", "mine.py")
    write_cluster(folder, setup=["export WORD=right"])
    resumed = slurm_launch("resume", run.name)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed: mine.py" in resumed.stderr and "setup: ['export WORD=wrong'] -> ['export WORD=right']" in resumed.stderr
    wait_for_end(run)
    assert rank_log(run, number=2) == "True\nfixed right\n"
    assert "a mistake" in next(run.glob("code-until-attempt-1/*/mine.py")).read_text()


def test_a_job_whose_run_folder_was_deleted_is_named_and_ends(slurm, slurm_launch):
    write(slurm_launch.folder, "import os, shutil, time\ntime.sleep(2)\nif os.environ['RANK'] == '0':\n"
                               "    shutil.rmtree(os.environ['LAUNCH_RUN_DIR'])\ntime.sleep(60)\n")
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 2, "--nodes", 2)
    wait_until(lambda: not run.exists())
    for command in ("status", "cancel"):
        done = slurm_launch(command, run.name)
        assert done.returncode == 2 and f"its folder was deleted or moved, but SLURM has its job {job}" in done.stderr
        assert f"scancel {job}" in done.stderr
    assert slurm.wait(job)["JobState"] == "FAILED" and not run.exists()


@pytest.mark.parametrize("files, args, error", [
    ({"assets/api_credentials.txt": "x"}, [], "git tracks a file that would not be copied with the code: "),
    ({"assets/api_credentials.txt": "x"}, ["run.include=[assets]"], None),
    ({"assets/api_credentials.txt": "x"}, ["run.leave_out=[assets]"], None),
], ids=["refused", "copied", "left out"])
def test_a_tracked_file_that_is_not_copied_is_refused(slurm, slurm_launch, files, args, error):
    folder = slurm_launch.folder / "proj"
    for name, text in {"work.py": "", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", "-C", str(folder), *words.split()], check=True)
    done = slurm_launch(folder / "work.py", "--procs", 1, *ON_TEST_CLUSTER, START_LATER, *args)
    if error:
        assert done.returncode == 2 and error in done.stderr
        assert_nothing_submitted(slurm_launch)
    else:
        assert done.returncode == 0 and done.stderr == ""
        assert len([*slurm_launch.run().glob("code/proj/assets/*")]) == ("include" in args[0])


@pytest.mark.slow
def test_a_queued_task_runs_with_the_code_and_spec_of_its_submission(slurm, slurm_launch):
    """A value of the spec may contain any characters."""
    folder = slurm_launch.folder
    blobs = Path(__file__).parents[1] / "blobs"
    text = (blobs / "blobs.py").read_text() + "\n\nclass Words(BlobsTask):\n    def data(self, world):\n" \
        "        print(WORD, ascii(self.config.model['words']))\n        return super().data(world)\n"
    write(folder, f"WORD = 'then'\n{text}", "mine.py")
    spec = write(folder, (blobs / "blobs.yaml").read_text().replace("blobs:BlobsTask", "mine:Words"), "mine.yaml")
    words = f"{HOSTILE}\\"
    run, (job,) = submit(slurm_launch, "mine.yaml", "--gpus", 1, "train.steps=2", f"model.words={json.dumps(words)}",
                         START_LATER)
    write(folder, f"WORD = 'now'\n{text}", "mine.py")
    write(folder, spec.read_text().replace("lr: 0.05", "lr: 0.5"), "mine.yaml")
    slurm.start_now(job)
    wait_for_end(run)
    assert f"then {ascii(words)}\n" in rank_log(run) and "lr: 0.05" in (run / "run.yaml").read_text()
    assert not [*folder.rglob("hacked"), *slurm.folder.rglob("hacked")]


# --- several nodes


def test_ranks_on_several_nodes(slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    run, (job,) = submit(slurm_launch, "work.py", "--gpus", 6, "--nodes", 3)
    wait_for_end(run)
    environments = [printed(run, rank)["env"] for rank in range(6)]
    for rank, env in enumerate(environments):
        assert [env[key] for key in TORCHRUN] == [str(rank), "6", str(rank % 2), "2", str(rank // 2), "3", "127.0.0.1"]
        assert env["SLURM_JOB_ID"] == job and env["SLURMD_NODENAME"] == f"n{rank // 2 + 1}"
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1" and env["SLURM_CPUS_PER_TASK"] == "2"
    assert len({env["MASTER_PORT"] for env in environments}) == 1
    assert attempt(run, 1)["nodes"] == ["n1", "n2", "n3"] and attempt(run, 1)["ranks"] == 6


def test_the_failure_of_a_rank_on_another_node_is_recorded(slurm_launch):
    write(slurm_launch.folder, "import os, signal, sys, time\nprint('rank', os.environ['RANK'], flush=True)\n"
                               "if os.environ['RANK'] == '2':\n    time.sleep(0.5)\n    raise ValueError('a bad 字')\n"
                               "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\ntime.sleep(600)\n")
    started = time.monotonic()
    run, _ = submit(slurm_launch, "work.py", "--gpus", 4, "--nodes", 2, "run.max_restarts=0")
    wait_for_end(run, "failed")
    assert time.monotonic() - started < 60
    failure = attempt(run, 1)["failure"]
    assert (failure["rank"], failure["node"], failure["exit_code"], failure["retry"]) == (2, "n2", 1, True)
    assert failure["message"].endswith("ValueError: a bad 字") and failure["traceback"].startswith("Traceback")
    assert [rank_log(run, rank).splitlines()[0] for rank in range(4)] == [f"rank {rank}" for rank in range(4)]
    assert "ValueError: a bad 字" in rank_log(run, 2)
    shown = slurm_launch("status", run.name).stdout
    assert "ValueError: a bad 字" in shown and "n2" in shown


def test_initial_weights_are_copied_at_submission_and_an_evaluation_is_a_job(slurm, slurm_launch):
    small = [BLOBS, "train.steps=4", "eval.every=2", "--procs", 1]
    assert slurm_launch(*small, "--runs", "others").returncode == 0
    (other,) = (slurm_launch.folder / "others").iterdir()
    run, (job,) = submit(slurm_launch, *small, "--from", other, START_LATER)
    evaluation, _ = submit(slurm_launch, "eval", other, "--procs", 1)
    assert evaluation.parent == other / "evals"
    wait_for_end(evaluation)
    assert record(evaluation)["metrics"] == record(other)["metrics"]
    done = slurm_launch("predict", other, "--set", "eval", "-o", "rows.txt", "--procs", 2, *ON_TEST_CLUSTER)
    assert done.returncode == 0, done.stderr
    (prediction,) = [path for path in (other / "evals").iterdir() if path != evaluation]
    wait_for_end(prediction)
    assert set((slurm_launch.folder / "rows.txt").read_text().split("\n", 101)) == {"0", "1", ""}
    shutil.rmtree(other)
    slurm.start_now(job)
    wait_for_end(run)
    assert record(run)["init"]["run"] == other.name and "tensors loaded" in rank_log(run)
