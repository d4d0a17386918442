"""Submitting to a real cluster: what is shown is what is submitted, it arrives as it was written, and what cannot run is
refused. The runs are scripts that import nothing heavy."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import BLOBS, Command, attempt, record, wait_until
from slurm.conftest import LoginCommand, write_cluster
from slurm.scripts import HOSTILE, LATER, SHOW, TORCHRUN, WHERE, finish, log, nothing_was_done, seen, submit, write

pytestmark = pytest.mark.slow  # not each, but together


# --- what is shown is what is submitted


@pytest.mark.parametrize("cluster, args", [
    ({}, ["--gpus", 8]),
    ({}, ["--gpus", 16, "--time", "4h", "sbatch.exclusive=true"]),
    ({"requeue": False, "chain": 3}, ["--gpus", 2]),
    ({"gpu_request": "gres", "cpus_per_gpu": 2, "mem_per_gpu": "1G"}, ["--gpus", 4, "run.grace_s=20"]),
    ({"prefix": ["env", "A WORD=it's $HOME"], "setup": ["export COLOUR='dark blue'"], "srun": ["--label"]}, ["--procs", 2]),
], ids=["a node", "two nodes", "a chain", "gres", "a prefix"])
def test_the_dry_run_is_what_is_submitted(slurm, slurm_launch, cluster, args):
    write(slurm_launch.folder, SHOW)
    write_cluster(slurm_launch.folder, **cluster)
    args = ["work.py", *args, LATER]
    config = {"XDG_CONFIG_HOME": str(slurm_launch.folder / "config")}
    without_slurm = Command(slurm_launch.folder)(*args, *WHERE, "--dry-run", PATH="/nonexistent", **config)
    assert without_slurm.returncode == 0, without_slurm.stderr
    text, plan = slurm_launch(*args, *WHERE, "--dry-run").stdout, slurm_launch(*args, *WHERE, "--dry-run", "--json").stdout
    plan = json.loads(plan)
    assert slurm_launch.runs() == []
    run, jobs = submit(slurm_launch, *args)

    def of_this_run(text: str) -> str:
        """With its id in the place of another's."""
        return re.sub(r"work-\d{8}-\d{6}-\w{4}", run.name, text)

    assert of_this_run(without_slurm.stdout) == of_this_run(text)
    script = of_this_run(plan["job"]["script"])
    assert script in of_this_run(text) and shutil.which("sbatch")
    assert len(jobs) == plan["job"]["links"] == cluster.get("chain", 1)
    for job in jobs:
        assert slurm.ask("scontrol", "write", "batch_script", job, "-").stdout == script
    for name, text in {**plan["files"], "submissions/1/job.sh": script}.items():
        assert (run / name).read_text() == of_this_run(text)


# --- what is written arrives


@pytest.mark.slow
def test_hostile_words_arrive_and_execute_nothing(slurm, slurm_launch):
    """Also in what the batch shell does after a node process was killed: the job is requeued without its node."""
    folder = slurm_launch.folder / HOSTILE
    folder.mkdir()
    write(folder, "import os\nif os.environ['LAUNCH_ATTEMPT'] == '1' and os.environ['RANK'] == '0':\n"
                  "    os.kill(os.getppid(), 9)\n" + SHOW, f"{HOSTILE}.py")
    write_cluster(folder, env={"OF_CLUSTER": HOSTILE}, data=HOSTILE, sbatch={"comment": f"{HOSTILE}\\n\\"})
    words = [HOSTILE, "back\\slash\\", "", "two\nlines", "-x", "--", " blanks ", "\t"]
    run, (job,) = submit(LoginCommand(folder, slurm), f"{HOSTILE}.py", "--procs", 2, "--nodes", 2,
                         f"sbatch.job-name={HOSTILE}\\j", "--", *words, OF_USER=f"{HOSTILE}\\\n")
    slurm.wait_requeued(job)
    assert slurm.run("squeue", "-h", "-o", "%k", "-j", job) == f"{HOSTILE}\\n\\\n"
    slurm.start_now(job)
    finish(run)
    for rank in (0, 1):
        found = seen(run, rank, number=2)
        assert found["argv"] == words and found["cwd"] == str(folder)
        assert found["env"]["OF_USER"] == f"{HOSTILE}\\\n"
        assert found["env"]["OF_CLUSTER"] == found["env"]["LAUNCH_DATA"] == HOSTILE
        assert found["env"]["SLURM_JOB_NAME"] == f"{HOSTILE}\\j"
    assert attempt(run, 1)["nodes"][0] not in attempt(run, 2)["nodes"]
    assert [path.name for path in sorted((run / "submissions/1").glob("*.out"))] == [f"{job}_{n}_log.out" for n in (0, 1)]
    assert not [*slurm_launch.folder.rglob("hacked"), *slurm.folder.rglob("hacked"), *Path.cwd().glob("hacked")]


@pytest.mark.parametrize("name", ["100% of %%", "%N%j"])
def test_percent_signs_in_the_folder_of_runs(slurm, slurm_launch, name):
    """srun has its own way with them."""
    write(slurm_launch.folder, SHOW)
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 2, "--nodes", 2, "--runs", name)
    finish(run)
    assert run.parent == slurm_launch.folder / name and seen(run, 1)["env"]["LAUNCH_RUN_DIR"] == str(run)
    assert {path.name for path in (run / "submissions/1").glob("*.out")} == {f"{job}_0_log.out", f"{job}_1_log.out"}


@pytest.mark.parametrize("where", ["command line", "cluster"])
def test_a_line_end_in_a_job_name_is_refused(slurm_launch, where):
    write(slurm_launch.folder, SHOW)
    name = "two\ntouch hacked"
    write_cluster(slurm_launch.folder, sbatch={"job-name": name} if where == "cluster" else {})
    given = [f"sbatch.job-name={name}"] if where == "command line" else []
    done = slurm_launch("work.py", "--procs", 1, *WHERE, *given)
    assert done.returncode == 2 and "`job-name` is 'two\\ntouch hacked', which holds a line end" in done.stderr
    nothing_was_done(slurm_launch)


def test_a_line_in_the_place_of_an_option_is_refused(slurm_launch):
    write(slurm_launch.folder, SHOW)
    done = slurm_launch("work.py", "--procs", 1, *WHERE, "sbatch.comment=x\ntouch hacked", "sbatch.x\ntouch hacked #=1")
    assert done.returncode == 2 and "is no option of sbatch" in done.stderr
    nothing_was_done(slurm_launch)


@pytest.mark.parametrize("name", ["a\\b", "two\nlines", "my%20folder", "%j%t"])
def test_a_folder_of_runs_that_srun_cannot_be_told_is_refused(slurm_launch, name):
    write(slurm_launch.folder, SHOW)
    done = slurm_launch("work.py", "--procs", 1, *WHERE, "--runs", name)
    assert done.returncode == 2 and "cannot be told" in done.stderr and "--runs DIR" in done.stderr
    assert not (slurm_launch.folder / name).exists()
    nothing_was_done(slurm_launch)


# --- what cannot run is refused


# What is asked for, keys of the cluster's file, variables, and words of the error.
REFUSED = {
    "partition": (["sbatch.partition=nope"], {}, {},
                  "refuses this job: invalid partition .*nope.*\nhint: there is main, short, urgent"),
    "partition misspelt": (["sbatch.partition=mian"], {}, {}, "did you mean sbatch.partition=main?"),
    "GPU type": (["--gpus", 2], {"gpu_type": "a100"}, {}, "not available\n.*gpus-per-node=a100:2, .*main.* 8 GPU"),
    "GPU type by gres": (["--gpus", 2], {"gpu_type": "a100", "gpu_request": "gres"}, {}, "not available\n.*gres=gpu:a100:2"),
    "GPUs of a real node": (["--gpus", 16], {"gpus_per_node": 16}, {}, "not available\n.*gpus-per-node=16.*8 GPU"),
    "nodes": (["--gpus", 32], {}, {}, "not available\n.*nodes=4, .*3 node"),
    "cores": (["--procs", 17], {}, {}, "not .*available\n.*cpus-per-task=17; .*16 cores"),
    "memory": (["--procs", 1, "sbatch.mem=900G"], {}, {}, "not .*available\n.*mem=900G; .*62 GiB"),
    "constraint": (["sbatch.constraint=nope"], {}, {}, "Invalid feature specification\n.*constraint=nope"),
    "the partition's time": (["sbatch.partition=short", "--time", "10m"], {}, {},
                             "the time limit is 0-00:10:00; partition `short` allows 0-00:03:00\n"),
    "any partition's time": (["sbatch.partition=short,main", "--time", "2d"], {}, {}, "partition `main` allows 1-00:00:00\n"),
    "time for the grace": (["--time", "1m"], {}, {}, "the time limit is 60 s, of which the last 105 s are for the checkpoint"),
    "a time": (["--time", "soon"], {}, {}, "--time is `soon`, which must be a time such as"),
    "nodes that divide": (["--gpus", 3, "--nodes", 2], {}, {}, "cannot be spread evenly over 2 nodes\n.*--gpus 2 or 4"),
    "an option of ours": (["sbatch.output=x"], {}, {}, "`output` cannot be set\n.*launch logs"),
    "an abbreviated option of ours": (["sbatch.arr=0-3"], {}, {}, "`array` cannot be set\n.*sweep"),
    "a short option": (["sbatch.p=short"], {}, {}, "'p' is no option of sbatch\n.*long name"),
    "an option": (["sbatch.nonsense=1"], {}, {}, "unrecognized option '--nonsense=1'"),
    "no SLURM": ([], {}, {"PATH": "/nonexistent", "SLURM_CONF": ""}, "there is no SLURM here: `sbatch` is not installed"),
    "no cluster": ([], {}, {"SLURM_CONF": ""}, "configuration source\n.*is SLURM_CONF right"),
    "a SLURM_CONF": ([], {}, {"SLURM_CONF": "/nonexistent/slurm.conf"}, "SLURM_CONF says `/nonexistent/slurm.conf`"),
    "an allocation": (["--here"], {}, {}, "--here runs in the allocation one stands in, and this is none"),
    "a run to wait for": (["--after", "nope"], {}, {}, "there is no run `nope`"),
    "a debugger": (["--debug"], {}, {}, "--debug runs one rank in this process, not on SLURM"),
}


@pytest.mark.parametrize("args, cluster, env, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused(slurm_launch, args, cluster, env, said):
    if "configuration source" in said and Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this host is one of a cluster's")
    write(slurm_launch.folder, SHOW)
    write_cluster(slurm_launch.folder, **cluster)
    began = time.monotonic()
    done = slurm_launch("work.py", *WHERE, *args, **env)
    assert time.monotonic() - began < 30
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) <= 2 and done.stdout == ""
    nothing_was_done(slurm_launch)


@pytest.mark.parametrize("args, said", [
    (["--nodes", 2], "`--nodes` is for SLURM"), (["--time", "1h"], "`--time` is for SLURM"),
    (["--follow"], "`--follow` is for SLURM"), (["sbatch.mem=1G"], "`sbatch.mem` is for SLURM"),
    (["--slurm", "--cluster", "local"], "`local` is no SLURM cluster"), (["--cluster", "nope"], "there is no cluster `nope`"),
])
def test_what_is_for_slurm_needs_it(slurm_launch, args, said):
    write(slurm_launch.folder, SHOW)
    done = slurm_launch("work.py", *args)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) <= 2
    nothing_was_done(slurm_launch)


def test_an_unknown_account_is_slurms_to_refuse(slurm, slurm_launch):
    """Without accounting it takes any."""
    write(slurm_launch.folder, SHOW)
    _, (job,) = submit(slurm_launch, "work.py", "sbatch.account=nobody", LATER)
    assert slurm.job(job)["Account"] == "nobody"


# --- habits that break launchers


HABITS = {
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


def picture(slurm, run: Path, ranks: int) -> dict:
    """Of a run of SHOW what must not depend on where and how it was submitted."""
    finish(run)
    assert record(run)["attempt"] == 1 and attempt(run, 1)["restart"] == 0
    job = slurm.wait(attempt(run, 1)["job"])  # until then SLURM counts the nodes that have not let go of it
    keys = (*TORCHRUN, "OMP_NUM_THREADS", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND",
            "SLURM_GPUS_ON_NODE", "SLURM_ARRAY_TASK_ID", "SLURM_SUBMIT_DIR", "HOME")
    found = {rank: seen(run, rank) for rank in range(ranks)}
    assert all(rank["env"]["LAUNCH_RUN_DIR"] == str(run) and rank["env"]["SLURM_JOB_NAME"] == run.name
               and 20_000 <= int(rank["env"]["MASTER_PORT"]) < 32_000 for rank in found.values())
    return {"job": {key: job[key] for key in JOB},
            **{rank: [said["argv"], said["cwd"], len(said["env"]["CUDA_VISIBLE_DEVICES"].split(",")),
                      {key: said["env"].get(key) for key in keys}] for rank, said in found.items()}}


@pytest.mark.slow
def test_habits_change_nothing(slurm, slurm_launch):
    """A run, one that was submitted with variables that SLURM's commands read, and two from inside another job, by its
    batch script and by a step of it with CPU binding."""
    folder = slurm_launch.folder
    write(folder, SHOW)
    args = ("work.py", "--gpus", 4, "--nodes", 2)
    expected = picture(slurm, submit(slurm_launch, *args)[0], ranks=4)
    assert expected["job"] == {"Partition": "main", "TimeLimit": "00:30:00", "Requeue": "1", "NumNodes": "2", "NumCPUs": "4",
                               "TresPerNode": "gres:gpu:2", "MinMemoryCPU": "500M", "OverSubscribe": "OK"}
    *_, gpus, variables = expected[3]
    assert [variables[key] for key in TORCHRUN] == ["3", "4", "1", "2", "1", "2", "127.0.0.1"]
    assert gpus == 2 and variables["SLURM_ARRAY_TASK_ID"] is None

    assert picture(slurm, submit(slurm_launch, *args, **HABITS)[0], ranks=4) == expected

    line = " ".join([sys.executable, "-P", "-m", "launch", *map(str, args), *WHERE])
    outer = write(folder, f"#!/bin/bash\nexport RANK=3 SBATCH_PARTITION=short\n{line}\nsrun -n1 -c2 {line}\n", "outer.sh")
    before = set(slurm_launch.runs())
    job = slurm.run("sbatch", "--parsable", "--partition=urgent", "--gpus-per-node=2", "-N1", "-n3", "-c2", "--no-requeue",
                    f"--output={folder}/outer.out", outer, cwd=folder, SBATCH_CPU_BIND="map_cpu:0", SLURM_CPU_BIND="none",
                    XDG_CONFIG_HOME=str(folder / "config")).strip()
    slurm.wait(job)
    runs = set(slurm_launch.runs()) - before
    assert len(runs) == 2, (folder / "outer.out").read_text()
    for run in runs:
        assert picture(slurm, run, ranks=4) == expected


def test_in_an_allocation_with_cpu_binding(slurm, slurm_launch):
    folder = slurm_launch.folder
    write(folder, SHOW)
    command = [sys.executable, "-P", "-m", "launch", "work.py", "--cluster", "here", "--here"]
    config = {"XDG_CONFIG_HOME": str(folder / "config"), "SLURM_CPU_BIND": "map_cpu:99", "SLURM_DISTRIBUTION": "plane=7"}
    allocate = ["salloc", "-Q", "-N2", "--gpus-per-node=2", "--gres-flags=disable-binding"]
    # By hand, and in the step of an interactive shell, which holds all of the allocation.
    for before in ([], ["srun", "-N1", "-n1", "--gpus-per-node=2"]):
        done = slurm.ask(*allocate, *before, *command, "--gpus", 4, "--nodes", 2, cwd=folder, **config)
        assert done.returncode == 0, done.stderr
        run = slurm_launch.runs()[-1]
        assert f"run {run.name} is finished" in done.stdout and record(run)["state"] == "finished"
        assert re.fullmatch(r"\d+\.\d+", record(run)["job"]["ids"][0]) and attempt(run, 1)["nodes"] == ["n1", "n2"]
        for rank in range(4):
            env = seen(run, rank)["env"]
            assert [env[key] for key in TORCHRUN] == [str(rank), "4", str(rank % 2), "2", str(rank // 2), "2", "127.0.0.1"]
            assert env["CUDA_VISIBLE_DEVICES"] == "0,1"

    there = slurm_launch.runs()
    done = slurm.ask("salloc", "-Q", "-N1", *command, "--procs", 2, "--nodes", 2, cwd=folder, **config)
    assert done.returncode == 2 and "srun could not start the run in allocation" in done.stderr
    assert slurm_launch.runs() == there


def test_ctrl_c_in_an_allocation_stops_the_run_and_resume_submits_it(slurm, slurm_launch):
    write(slurm_launch.folder, "import os, time\nif os.environ['LAUNCH_ATTEMPT'] == '1': time.sleep(600)\n" + SHOW)
    slurm.run("salloc", "-N2", "--no-shell")
    (allocation,) = slurm.run("squeue", "-h", "-o", "%A").split()
    process = slurm_launch.start("work.py", "--procs", 2, "--nodes", 2, *WHERE, "--here", SLURM_JOB_ID=allocation)
    run = wait_until(slurm_launch.runs, process=process)[0]
    wait_until(lambda: (run / "attempts/1/logs/1.log").exists(), process=process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and f"run {run.name} is preempted; go on with `launch resume {run.name}`\n" in out
    assert attempt(run, 1)["outcome"] == "preempted" and slurm.job(allocation)["JobState"] == "RUNNING"
    assert slurm_launch("resume", run.name).returncode == 0
    finish(run)
    assert attempt(run, 2)["job"] == record(run)["job"]["ids"][0] != allocation and attempt(run, 2)["nodes"] == ["n1", "n2"]


# --- ports


@pytest.mark.slow
def test_runs_submitted_at_the_same_instant_never_share_a_port(slurm, slurm_launch):
    """Two of two ranks to one node, in 20 tries; each stays until both listen on theirs."""
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
    shared = tried_again = 0
    for number in range(tries):
        place = slurm_launch.folder / f"try{number}"
        place.mkdir()
        both = [slurm_launch.start("work.py", "--procs", 2, *WHERE, "--json", "sbatch.nodelist=n1", "--", place) for _ in "ab"]
        told = [json.loads(each.communicate(timeout=120)[0]) for each in both]
        for each in told:
            finish(Path(each["path"]))
        ports = [(place / each["id"]).read_text() for each in told]
        shared += ports[0] == ports[1]
        tried_again += sum(record(Path(each["path"]))["attempt"] > 1 for each in told)
    print(f"{tries} tries: {shared} shared a port, {tried_again} runs had to choose another")
    assert shared == tried_again == 0


# --- how long it takes


def test_from_the_command_to_the_job_id(slurm_launch):
    write(slurm_launch.folder, SHOW)
    write_cluster(slurm_launch.folder, max_nodes=64)

    def took(*args: object) -> tuple[float, float]:
        """Seconds, and those of them that a core was at work for it: that others want the cores adds none."""
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = slurm_launch("work.py", *args, *WHERE)
        assert done.returncode == 0, done.stderr
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic() - began, now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime

    for what, args in {"from the command to the job id": ("--gpus", 8, LATER),
                       "--dry-run for 64 nodes": ("--gpus", 512, "--dry-run")}.items():
        wall_s, work_s = map(min, zip(*(took(*args) for _ in range(3))))
        print(f"{what}: {wall_s:.2f} s, at work for {work_s:.2f} s")
        assert wall_s < 10 and work_s < 2


# --- following, and one after another


@pytest.mark.slow
def test_follow_shows_the_log_to_the_end(slurm_launch):
    """Over a failure that is tried again."""
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
    done = slurm_launch("work.py", "--procs", 1, *WHERE, "--follow", "run.max_restarts=0")
    assert done.returncode == 1 and done.stdout.endswith(f"it must fail\nrun {slurm_launch.runs()[-1].name} is failed\n")


def test_who_follows_may_leave(slurm_launch):
    write(slurm_launch.folder, "import os, time\nprint('one', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.05)\n")
    following = slurm_launch.start("work.py", "--procs", 1, *WHERE, "--follow")
    for line in following.stdout:
        if line == "one\n":
            following.send_signal(signal.SIGINT)
            break
    out, err = following.communicate(timeout=120)
    run = slurm_launch.run()
    assert following.returncode == 0 and out == f"run {run.name} is running\n" and err == ""
    (slurm_launch.folder / "go").touch()
    finish(run)
    assert record(run)["attempt"] == 1


def test_what_is_resumed_is_asked_for_as_before(slurm, slurm_launch):
    """But for what is said anew."""
    write(slurm_launch.folder, "import time\ntime.sleep(600)\n")
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 2, "--nodes", 2, "--time", "10m", "sbatch.comment=then",
                         "sbatch.nice=5", LATER)
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
def test_a_run_after_another(slurm, slurm_launch):
    folder = slurm_launch.folder
    write(folder, "import sys, time\nprint(time.time(), flush=True)\ntime.sleep(1)\nprint(time.time())\nsys.exit(sys.argv[1])\n"
                  .replace("sys.argv[1]", "int(sys.argv[1])"))
    first, (job,) = submit(slurm_launch, "work.py", "--procs", 1, "--", 0)
    second, (later,) = submit(slurm_launch, "work.py", "--procs", 1, "--after", first.name, "--", 0)
    assert slurm.job(later)["Dependency"].startswith(f"afterok:{job}")
    finish(second)
    assert float(log(first).split()[1]) < float(log(second).split()[0])
    third, (job,) = submit(slurm_launch, "work.py", "--procs", 1, "--after", second.name, "run.max_restarts=0", "--", 1)
    assert slurm.job(job)["Dependency"] == "(null)"  # it is finished
    fourth, _ = submit(slurm_launch, "work.py", "--procs", 1, "--after", third.name, "--", 0)
    finish(third, "failed")
    wait_until(lambda: "it will never start" in slurm_launch("status", fourth.name).stdout)
    done = slurm_launch("work.py", "--procs", 1, *WHERE, "--after", third.name)
    assert done.returncode == 2 and f"run {third.name} is failed: nothing to wait for" in done.stderr


# --- the code as it was


def test_a_queued_script_runs_as_it_was_submitted(slurm, slurm_launch):
    folder = slurm_launch.folder
    write(folder, "import mine\nprint('the script', 'then', mine.WORD)\n")
    write(folder, "WORD = 'then'\n", "mine.py")
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, LATER)
    write(folder, "raise SystemExit('edited')\n")
    write(folder, "WORD = 'now'\n", "mine.py")
    slurm.start_now(job)
    finish(run)
    assert log(run) == "the script then then\n"
    write(folder, "print('new')\n")
    assert slurm_launch("work.py", "--procs", 1).stdout.count("new\n") == 1  # here it is as it is now


@pytest.mark.slow
def test_a_queued_task_runs_as_it_was_submitted(slurm, slurm_launch):
    """Its module, and the keys of its spec, whatever they hold."""
    folder = slurm_launch.folder
    blobs = Path(__file__).parents[1] / "blobs"
    text = (blobs / "blobs.py").read_text() + "\n\nclass Words(BlobsTask):\n    def data(self, world):\n" \
        "        print(WORD, ascii(self.config.model['said']))\n        return super().data(world)\n"
    write(folder, f"WORD = 'then'\n{text}", "mine.py")
    spec = write(folder, (blobs / "blobs.yaml").read_text().replace("blobs:BlobsTask", "mine:Words"), "mine.yaml")
    said = f"{HOSTILE}\\"
    run, (job,) = submit(slurm_launch, "mine.yaml", "--gpus", 1, "train.steps=2", f"model.said={json.dumps(said)}",
                         LATER)
    write(folder, f"WORD = 'now'\n{text}", "mine.py")
    write(folder, spec.read_text().replace("lr: 0.05", "lr: 0.5"), "mine.yaml")
    slurm.start_now(job)
    finish(run)
    assert f"then {ascii(said)}\n" in log(run) and "lr: 0.05" in (run / "run.yaml").read_text()
    assert not [*folder.rglob("hacked"), *slurm.folder.rglob("hacked")]


# --- several nodes


def test_ranks_of_several_nodes(slurm_launch):
    write(slurm_launch.folder, SHOW)
    run, (job,) = submit(slurm_launch, "work.py", "--gpus", 6, "--nodes", 3)
    finish(run)
    found = [seen(run, rank)["env"] for rank in range(6)]
    for rank, env in enumerate(found):
        assert [env[key] for key in TORCHRUN] == [str(rank), "6", str(rank % 2), "2", str(rank // 2), "3", "127.0.0.1"]
        assert env["SLURM_JOB_ID"] == job and env["SLURMD_NODENAME"] == f"n{rank // 2 + 1}"
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1" and env["SLURM_CPUS_PER_TASK"] == "2"
    assert len({env["MASTER_PORT"] for env in found}) == 1
    assert attempt(run, 1)["nodes"] == ["n1", "n2", "n3"] and attempt(run, 1)["ranks"] == 6


def test_a_failure_on_another_node_is_the_one_recorded(slurm_launch):
    write(slurm_launch.folder, "import os, signal, sys, time\nprint('rank', os.environ['RANK'], flush=True)\n"
                               "if os.environ['RANK'] == '2':\n    time.sleep(0.5)\n    raise ValueError('a bad 字')\n"
                               "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\ntime.sleep(600)\n")
    began = time.monotonic()
    run, _ = submit(slurm_launch, "work.py", "--gpus", 4, "--nodes", 2, "run.max_restarts=0")
    finish(run, "failed")
    assert time.monotonic() - began < 60
    failure = attempt(run, 1)["failure"]
    assert (failure["rank"], failure["node"], failure["exit_code"], failure["retry"]) == (2, "n2", 1, True)
    assert failure["message"].endswith("ValueError: a bad 字") and failure["traceback"].startswith("Traceback")
    assert [log(run, rank).splitlines()[0] for rank in range(4)] == [f"rank {rank}" for rank in range(4)]
    assert "ValueError: a bad 字" in log(run, 2)
    shown = slurm_launch("status", run.name).stdout
    assert "ValueError: a bad 字" in shown and "n2" in shown


def test_weights_of_another_run_wait_in_the_queue_and_an_evaluation_is_a_job(slurm, slurm_launch):
    small = [BLOBS, "train.steps=4", "eval.every=2", "--procs", 1]
    assert slurm_launch(*small, "--runs", "others").returncode == 0
    (other,) = (slurm_launch.folder / "others").iterdir()
    run, (job,) = submit(slurm_launch, *small, "--from", other, LATER)
    evaluation, _ = submit(slurm_launch, "eval", other, "--procs", 1)
    assert evaluation.parent == other / "evals"
    finish(evaluation)
    assert record(evaluation)["metrics"] == record(other)["metrics"]
    shutil.rmtree(other)
    slurm.start_now(job)
    finish(run)
    assert record(run)["init"]["run"] == other.name and "tensors taken" in log(run)
