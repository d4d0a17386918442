"""Parsing the output of SLURM's commands. The texts are output of SLURM 22.05."""

from __future__ import annotations

import os

import pytest

from launch.cluster import reasons, slurm, slurm_command
from launch.cluster.slurm_command import environment
from trainers.contract.errors import UserError

SACCT = """\
1|FAILED|3:0|2026-11-24T02:46:36|n1|None
1.batch|FAILED|3:0|2026-11-24T02:46:36|n1|
2|FAILED|0:9|2026-11-24T02:46:36|n1|None
4|CANCELLED by 0|0:0|2026-11-24T02:46:39|n[1-2]|None
5|CANCELLED by 0|0:0|2026-11-24T02:46:39|None assigned|JobHeldUser
8|RUNNING|0:0|Unknown|n1|None
8.0|COMPLETED|0:0|2026-11-24T02:46:38|n1|
8.1|RUNNING|0:0|Unknown|n1|
6_1|FAILED|1:0|2026-11-24T02:46:36|n1|None
6_1.batch|FAILED|1:0|2026-11-24T02:46:36|n1|
"""
SQUEUE = """\
114_1|PENDING|0|N/A|N/A|4294901646|1||main|2026-11-24T02:11:28|JobArrayTaskLimit|/tmp/s.sh
116|PENDING|0|2026-11-24T02:41:28|N/A|4294901644|3||main|2026-11-24T02:11:28|Resources|(null)
112|RUNNING|0|2026-11-24T02:11:28|2026-11-25T02:11:28|4294901648|2|n[1-2]|main|2026-11-24T02:11:27|None|/tmp/a b|c 中文/s.sh
"""
ENDED = """\
121|FAILED|768|2026-11-24T02:11:50|2026-11-24T02:11:54|1|1|n1|main|2026-11-24T02:11:49|NonZeroExitCode|/tmp/s.sh
122|FAILED|9|2026-11-24T02:11:50|2026-11-24T02:11:54|1|1|n1|main|2026-11-24T02:11:49|None|/tmp/s.sh
"""


@pytest.fixture
def output(monkeypatch):
    """The output of each command, by the command's name. A command without an entry fails."""
    texts = {}

    def call(*words, **_):
        if words[0] not in texts:
            raise UserError(f"`{words[0]}` failed: Slurm accounting storage is disabled")
        return texts[words[0]]

    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setenv("TZ", "UTC")
    return texts


def test_queue_returns_the_jobs_that_are_asked_for(output):
    output["squeue"] = SQUEUE
    jobs = slurm.queue(["114_1", "116", "112", "99999"])
    assert list(jobs) == ["114_1", "116", "112"]
    assert (jobs["112"].script, jobs["112"].node_list, jobs["112"].waiting) == ("/tmp/a b|c 中文/s.sh", "n[1-2]", False)
    assert (jobs["114_1"].start, jobs["114_1"].reason, jobs["114_1"].waiting) == (None, "JobArrayTaskLimit", True)
    assert (jobs["116"].script, jobs["116"].priority, jobs["116"].nodes) == (None, 4294901644, 3)
    assert list(slurm.queue(["116"])) == ["116"], "other jobs must not be returned"


def test_only_jobs_of_this_user_are_asked_for(output, monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "call", lambda *words, **_: asked.append(words) or SQUEUE)
    assert len(slurm.queue()) == 3 and f"--user={os.getuid()}" in asked[0]
    slurm.queue(["116"])
    assert "--jobs=116" in asked[1]


def test_nodes_that_a_job_excludes(output):
    output["squeue"] = "n[2-3]\n(null)\nn3,m1\n"
    assert slurm.excluded("7") == ["m1", "n2", "n3"]
    output["squeue"] = "(null)\n"
    assert slurm.excluded("7") == []


@pytest.mark.parametrize("text, seconds", [("1:23", 83), ("1-00:00:05", 86405), ("2:00:00", 7200), ("0:00", 0),
                                           ("UNLIMITED", None), ("INVALID", None), ("", None)])
def test_the_time_that_is_left(output, text, seconds):
    output["squeue"] = f"{text}\n"
    assert slurm.time_left_s("9_3") == seconds


def test_history_from_accounting(output):
    output["squeue"] = ""
    output["sacct"] = SACCT
    ended = slurm.history(["1", "2", "4", "5", "6_1", "8", "8.0", "8.1"])
    assert {id: (end.state, end.exit_code, end.signal, end.nodes) for id, end in ended.items()} == {
        "1": ("FAILED", 3, None, ["n1"]), "2": ("FAILED", None, 9, ["n1"]), "4": ("CANCELLED", 0, None, ["n1", "n2"]),
        "5": ("CANCELLED", 0, None, []), "8.0": ("COMPLETED", 0, None, ["n1"]), "6_1": ("FAILED", 1, None, ["n1"])}
    del output["sacct"]
    assert slurm.history(["1"]) == {}, "a cluster without accounting is not an error"


def test_the_controller_overrides_accounting(output):
    output["squeue"] = ENDED
    output["sacct"] = "121|COMPLETED|0:0|2020-01-01T00:00:00|n9|None\n"
    ended = slurm.history(["121", "122"])
    assert [(end.exit_code, end.signal, end.nodes) for end in ended.values()] == [(3, None, ["n1"]), (None, 9, ["n1"])]


def test_one_call_tells_which_jobs_wait_and_which_have_ended(monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "call", lambda *words, **_: asked.append(words) or SQUEUE + ENDED)
    queued, ended = slurm.look(["116", "121", "122", "999"])
    assert (list(queued), list(ended)) == (["116"], ["121", "122"]) and len(asked) == 1
    assert ended["121"].ended is not None


def test_partitions_with_different_nodes(output):
    output["sinfo"] = ("main*|up|1-00:00:00|3|16|64000|gpu:8\n"
                     "main*|up|1-00:00:00|2|128|512000|gpu:a100:4(S:0-1),gpu:v100:2,mps:8\n"
                     "long|drain|infinite|1|8|16000|(null)\n")
    main, long = slurm.partitions()
    assert main == slurm.Partition("main", True, 86400, 5, {"": 8, "a100": 4, "v100": 2}, 128, 512000, "up")
    assert (long.default, long.time_s, long.gpus, long.up) == (False, None, {}, False)


def test_states_of_nodes(output):
    output["sinfo"] = "n1|idle|none\nn2|down*|Not responding\nn3|mixed*|none\nn4|idle~|none\nn5|drained|bad | disk\n"
    assert slurm.node_states(["n1"]) == {"n1": ("IDLE", ""), "n2": ("DOWN", "Not responding"), "n3": ("NOT_RESPONDING", ""),
                                         "n4": ("IDLE", ""), "n5": ("DRAINED", "bad | disk")}


@pytest.mark.parametrize("node_list, names", [
    ("", []), ("n1", ["n1"]), ("n[1-3,7],m01", ["n1", "n2", "n3", "n7", "m01"]),
    ("n[08-11]", ["n08", "n09", "n10", "n11"]), ("r[1-2]n[3-4]x", ["r1n3x", "r1n4x", "r2n3x", "r2n4x"]),
])
def test_lists_of_nodes_are_expanded(node_list, names):
    assert slurm.expand(node_list) == names


@pytest.mark.parametrize("reason, plain", [
    ("Priority", "higher priority"), ("Resources", "become free"), ("DependencyNeverSatisfied", "cannot start"),
    ("BeginTime", "two minutes"), ("ReqNodeNotAvail, UnavailableNodes:n2", "down, draining or reserved"),
    ("QOSMaxGRESPerUser", "allows one user"), ("QOSMaxGRESPerJob", "allows one job"), ("QOSGrpGRES", "at once"),
    ("AssocGrpCpuLimit", "at once"), ("AssocMaxJobsLimit", "allows one user"), ("QOSMinGRES", "less than its QOS"),
    ("job requeued in held state", "it was requeued and put on hold"), ("launch failed requeued held", "could not start it"),
    ("JobHoldMaxRequeue", "too many failed starts"), ("JobHeldAdmin", "by an administrator"),
    ("PartitionTimeLimit", "this time limit"),
    ("SomethingNew", "SomethingNew"),
])
def test_reasons_in_plain_words(reason, plain):
    assert plain in reasons.in_words(reason)


@pytest.mark.parametrize("reason, text", [
    ("Priority", "jobs of higher priority come first (Priority)"), ("None", "SLURM has not looked at it yet"),
    ("SomethingNew", "SomethingNew"),
])
def test_slurms_own_word_follows_in_brackets_if_there_is_one(reason, text):
    assert reasons.in_words_with_code(reason) == text


@pytest.mark.parametrize("end, text", [
    ("ON n1 CANCELLED AT 2026-01-02T00:00:00 DUE TO PREEMPTION ***", "preempted: another job took its nodes"),
    ("ON n1 CANCELLED AT 2026-01-02T00:00:00 ***", "cancelled with scancel"),
    ("ON n1 CANCELLED AT 2026-01-02T00:00:00 DUE TO JOB REQUEUE ***", "requeued with scontrol"),
    ("ON n1 CANCELLED AT 2026-01-02T00:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "a node failed"),
    ("ON n1 CANCELLED AT 2026-01-02T00:00:00 DUE TO SOMETHING NEW ***", "stopped by SLURM: something new"),
    ("ON n1", None),
])
def test_the_reason_of_a_stop_is_read_from_the_jobs_log(end, text):
    assert reasons.of_stop(f"attempt 1\nslurmstepd-n1: error: *** STEP 7.0 {end}\nsrun: forcing job termination\n") == text


def test_a_job_script_that_a_signal_ended_did_not_fail_to_start():
    assert reasons.of_end("JobLaunchFailure", 15) == "SIGTERM ended the job's script"
    assert reasons.of_end("JobLaunchFailure", 53).startswith("a node could not start it")
    assert reasons.of_end("NonZeroExitCode", None) == reasons.of_end("None", 9) == ""


def test_jobs_get_the_users_environment_without_foreign_variables():
    own = {"PATH": "/bin", "SLURM_CONF": "/etc/c", "HOME": "/h", "RANKING": "1", "LAUNCH_RUNS": "/r", "LAUNCH_DATA": "/d",
           "WORLD_SIZES": "1", "WANDB_API_KEY": "k"}
    foreign = ["SBATCH_EXPORT", "SBATCH_PARTITION", "SLURM_CPU_BIND", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK", "SQUEUE_FORMAT",
               "SINFO_FORMAT", "SACCT_FORMAT", "SCANCEL_STATE", "CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE",
               "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "LAUNCH_RUN_DIR", "LAUNCH_ATTEMPT", "PMIX_RANK",
               "SUBMITIT_PREEMPT_SIGNAL"]
    assert environment({**own, **dict.fromkeys(foreign, "x")}) == own


def test_a_command_that_fails_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none"))
    with pytest.raises(UserError, match="SLURM_CONF is .*none`, but this file does not exist"):
        slurm.call("squeue")
    monkeypatch.delenv("SLURM_CONF")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no SLURM here: `squeue` is not installed"):
        slurm.call("squeue")
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\necho 'squeue: error: one' >&2; echo 'squeue: fatal: Unable to contact slurm controller' >&2\n"
                       "exit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError) as caught:
        slurm.call("squeue")
    assert caught.value.message == "`squeue` failed: one; Unable to contact slurm controller"
    assert "scontrol ping" in caught.value.hint


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Put a command on PATH. It fails by its first `failures` calls, and counts its calls in a file."""
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_command.time, "sleep", lambda _: None)

    def make(name, failures=0, complaint="Socket timed out on send/recv operation", answer="echo 7", pause_s=0.0):
        (tmp_path / name).write_text(f"""#!/bin/sh
echo x >> {tmp_path}/calls
sleep {pause_s}
[ $(wc -l < {tmp_path}/calls) -gt {failures} ] || {{ echo "{name}: error: {complaint}" >&2; exit 1; }}
{answer}
""")
        (tmp_path / name).chmod(0o755)
        return lambda: len((tmp_path / "calls").read_text().splitlines())

    return make


@pytest.mark.parametrize("words", [["squeue"], ["scontrol", "show", "config"], ["scontrol", "release", "7"], ["scancel", "7"],
                                   ["sbatch", "--test-only"]])
def test_a_command_that_can_be_repeated_is_tried_again(program, words):
    calls = program(words[0], failures=2)
    assert slurm.call(*words) == "7\n" and calls() == 3


@pytest.mark.parametrize("words, complaint", [
    (["sbatch", "job.sh"], "Socket timed out"), (["scancel", "--signal=TERM", "7"], "Socket timed out"),
    (["scontrol", "requeue", "7"], "Socket timed out"), (["squeue"], "Invalid job id specified"),
    (["sacct"], "Slurm accounting storage is disabled"),
], ids=str)
def test_a_command_is_not_repeated_if_it_would_do_harm_or_cannot_help(program, words, complaint):
    calls = program(words[0], failures=2, complaint=complaint)
    with pytest.raises(UserError, match=complaint):
        slurm.call(*words)
    assert calls() == 1


def test_a_command_that_keeps_failing_is_given_up(program):
    calls = program("squeue", failures=9)
    with pytest.raises(UserError, match="Socket timed out"):
        slurm.call("squeue")
    assert calls() == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_who_waits_is_told_what_for(program, monkeypatch, capsys, terminal):
    program("squeue", pause_s=0.3)
    monkeypatch.setattr(slurm_command, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert slurm.call("squeue", stdin="text" * 50_000) == "7\n"
    assert capsys.readouterr().err == ("waiting for squeue ...\n" if terminal else "")
    with pytest.raises(UserError, match="did not answer within 0.2 s"):
        slurm.call("squeue", timeout_s=0.2)
