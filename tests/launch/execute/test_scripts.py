"""Runs of small scripts on this machine. The scripts import nothing heavy, so the tests are about the launcher."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import alive, attempt, ranks_of, record, wait_until

from launch.records.process import stopped


def script(folder: Path, text: str, name: str = "work.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def log(run: Path, rank: int, number: int = 1) -> str:
    return (run / "attempts" / str(number) / "logs" / f"{rank}.log").read_text()


def test_ranks_get_torchruns_variables_and_a_log_each(launch):
    script(launch.folder, "import os, sys\n"
           "print(*(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')), sys.argv[1:])\n"
           "print(os.environ['MASTER_ADDR'], 20000 <= int(os.environ['MASTER_PORT']) < 32000, file=sys.stderr)\n"
           "assert sys.stdin.read() == '' and os.path.isdir(os.environ['LAUNCH_RUN_DIR'])\n")
    args = ["--lr", "1e-3", "a b", "$(touch hacked)", "%j", "逗,号"]
    done = launch("work.py", "--procs", 3, "--", *args)
    assert done.returncode == 0, done.stderr
    run = launch.run()
    for rank in range(3):
        assert log(run, rank) == f"{rank} {rank} 3 3 {args}\n127.0.0.1 True\n"
    assert f"0 0 3 3 {args}\n" in done.stdout and "1 1 3 3" not in done.stdout
    assert not (launch.folder / "hacked").exists()
    assert record(run)["state"] == "finished" and attempt(run, 1)["outcome"] == "finished"


def test_user_files_named_like_our_packages_break_nothing(launch):
    (launch.folder / "trainers").mkdir()
    script(launch.folder, "raise SystemExit('the user\\'s launch.py was imported')", "launch.py")
    script(launch.folder, "mine = 'the user\\'s own'", "trainers/__init__.py")
    script(launch.folder, "import trainers\nprint(trainers.mine)")
    done = launch("work.py", "--procs", 1)
    assert done.returncode == 0 and "the user's own" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_first_failure_is_recorded_and_the_other_ranks_are_killed(launch):
    script(launch.folder, "import os, signal, time\n"
           "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
           "if os.environ['RANK'] == '1':\n    time.sleep(0.5)\n    raise ValueError('a bad \\u5b57')\n"
           "time.sleep(600)\n")
    began = time.monotonic()
    done = launch("work.py", "--procs", 3)
    assert done.returncode == 1 and time.monotonic() - began < 60
    failure = attempt(launch.run(), 1)["failure"]
    assert (failure["rank"], failure["exit_code"], failure["signal"]) == (1, 1, None)
    assert failure["traceback"].startswith("Traceback") and failure["traceback"].endswith("ValueError: a bad 字")
    assert "error: rank 1 ended with exit code 1: ValueError: a bad 字" in done.stderr and "Traceback" in done.stderr
    assert record(launch.run())["state"] == "failed"


def test_a_killed_rank_is_reported_with_its_signal(launch):
    script(launch.folder, "import time; print('up', flush=True); time.sleep(600)")
    process = launch.start("work.py", "--procs", 2)
    ranks = wait_until(lambda: len(ranks_of(process.pid)) == 2 and ranks_of(process.pid), process=process)
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: rank 1 was ended by SIGKILL" in err
    failure = attempt(launch.run(), 1)["failure"]
    assert (failure["rank"], failure["exit_code"], failure["signal"]) == (1, None, "SIGKILL")
    assert not any(map(alive, ranks))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT])
def test_no_rank_outlives_the_node_process(launch, number):
    script(launch.folder, "import time; print('up', flush=True); time.sleep(600)")
    process = launch.start("work.py", "--procs", 3)
    ranks = wait_until(lambda: len(ranks_of(process.pid)) == 3 and ranks_of(process.pid), process=process)
    wait_until(lambda: all(p.read_text() for p in launch.folder.glob("runs/*/attempts/1/logs/*.log")))
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_until(lambda: not any(map(alive, ranks)))
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75)


def test_nohup_is_respected(launch):
    script(launch.folder, "import time; print('up', flush=True); time.sleep(2)")
    process = launch.start("work.py", "--procs", 1, ignoring=(signal.SIGHUP,))
    wait_until(lambda: any(p.read_text() for p in launch.folder.glob("runs/*/attempts/1/logs/0.log")), process=process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_ctrl_z_stops_the_ranks_too_until_the_run_is_continued_or_cancelled(launch):
    script(launch.folder, "import time; print('up', flush=True); time.sleep(600)")
    process = launch.start("work.py", "--procs", 2, group=0)
    ranks = wait_until(lambda: len(ranks_of(process.pid)) == 2 and ranks_of(process.pid), process=process)
    wait_until(lambda: sum(bool(p.read_text()) for p in launch.folder.glob("runs/*/attempts/1/logs/*.log")) == 2)

    def all_stopped() -> list[bool]:
        return [stopped(pid) for pid in (process.pid, *ranks)]

    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: all(all_stopped()), timeout_s=20)
    assert f"process {process.pid} is stopped, by Ctrl-Z or SIGSTOP" in launch("status", launch.run().name).stdout
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: not any(all_stopped()), timeout_s=20)
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: all(all_stopped()), timeout_s=20)
    assert launch("cancel", launch.run().name).stdout.endswith(": cancelled\n")
    process.communicate(timeout=60)
    assert not any(map(alive, ranks))


def test_a_second_ctrl_c_stops_at_once(launch):
    script(launch.folder, "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
           "print('up', flush=True); time.sleep(600)")
    process = launch.start("work.py", "--procs", 1)
    wait_until(lambda: any(p.read_text() for p in launch.folder.glob("runs/*/attempts/1/logs/0.log")), process=process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Ctrl-C again stops at once" in out
    assert attempt(launch.run(), 1)["reason"] == "Ctrl-C twice: stopped at once"


def test_ranks_that_do_not_stop_are_killed_after_the_grace(launch):
    script(launch.folder, "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
           "print('up', flush=True); time.sleep(600)")
    process = launch.start("work.py", "--procs", 1, "run.grace_s=1")
    wait_until(lambda: any(p.read_text() for p in launch.folder.glob("runs/*/attempts/1/logs/0.log")), process=process)
    began = time.monotonic()
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and 0.9 < time.monotonic() - began < 60
    run = launch.run()
    assert "rank 0 did not stop within 1 s (run.grace_s) of SIGTERM and was killed" in out
    assert record(run)["state"] == "preempted" and attempt(run, 1)["reason"].endswith("and was killed")
    resumed = launch.start("resume", run.name, "run.grace_s=2", "run.max_restarts=1")
    wait_until(lambda: any(p.read_text() for p in run.glob("attempts/2/logs/0.log")), process=resumed)
    resumed.terminate()
    out, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 75 and "within 2 s" in out
    refused = launch("resume", run.name, "run.grace=2")
    assert refused.returncode == 2 and "run.grace_s" in refused.stderr


def test_restarts_are_counted_and_resume_resets_the_count(launch):
    script(launch.folder, "import os, sys\nn = int(os.environ['LAUNCH_ATTEMPT'])\nprint('attempt', n)\nsys.exit(n < 4)\n")
    done = launch("work.py", "--procs", 1, "run.max_restarts=1")
    assert done.returncode == 1 and "attempt 2" in done.stdout and "attempt 3" not in done.stdout
    run = launch.run()
    assert [attempt(run, n)["outcome"] for n in (1, 2)] == ["failed", "failed"]
    assert launch("resume", run.name).returncode == 0  # attempts 3 and 4
    assert record(run)["attempt"] == 4 and record(run)["state"] == "finished"


def test_binary_output_and_long_lines_reach_the_log_unchanged(launch):
    script(launch.folder, "import os\nos.write(1, b'\\xff\\xfe no utf-8\\n' + b'x' * 300_000 + b'\\nno newline at the end')")
    done = launch("work.py", "--procs", 1)
    assert done.returncode == 0, done.stderr
    path = launch.run() / "attempts/1/logs/0.log"
    assert path.read_bytes() == b"\xff\xfe no utf-8\n" + b"x" * 300_000 + b"\nno newline at the end"


def test_output_that_only_looks_like_an_event_stays_text(launch):
    script(launch.folder, r"print('\x1e{\"event\": \"step\"}'); print('\x1e[1]'); print('a\x1eb')")
    done = launch("work.py", "--procs", 1)
    assert done.returncode == 0, done.stderr
    assert log(launch.run(), 0) == '\x1e{"event": "step"}\n\x1e[1]\na\x1eb\n'


def test_json_is_one_object_a_line(launch):
    script(launch.folder, "print('hello'); raise SystemExit(3)")
    done = launch("work.py", "--procs", 1, "--json")
    assert done.returncode == 3
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"event": "text", "line": "hello"} in events
    assert events[-1]["event"] == "failure" and events[-1]["exit_code"] == 3


def test_missing_gpus_are_an_error(launch):
    script(launch.folder, "print(1)")
    done = launch("work.py", "--gpus", 2, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and not launch.runs()
    assert done.stderr.startswith("error: --gpus 2 was asked for, but this machine has 0") and done.stderr.count("\n") == 2


def test_debug_runs_in_the_command_itself_with_its_standard_input(launch):
    import subprocess
    import sys

    from conftest import environment

    script(launch.folder, "import os\nbreakpoint()\nprint('went on', os.getpid(), os.environ['WORLD_SIZE'])\n")
    process = subprocess.Popen([sys.executable, "-P", "-m", "launch", "work.py", "--debug"], cwd=launch.folder, text=True,
                               env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate("p 6 * 7\nc\n", timeout=60)
    assert process.returncode == 0, err
    assert "42" in out and f"went on {process.pid} 1" in out
    assert record(launch.run())["state"] == "finished"


def test_the_dry_run_writes_nothing_and_is_what_runs(launch):
    script(launch.folder, "import json, os\n"
           "print(json.dumps(dict(os.environ)), flush=True)\nprint(open('/proc/self/cmdline').read().split('\\0')[:-1])")
    args = ["work.py", "--procs", "2", "--", "a b", "'"]
    dry = launch(*args[:3], "--dry-run", "--json", *args[3:])
    assert dry.returncode == 0, dry.stderr
    assert list(launch.folder.iterdir()) == [launch.folder / "work.py"]
    plan = json.loads(dry.stdout)
    assert launch(*args).returncode == 0
    run = launch.run()
    for path, text in plan["files"].items():
        assert (run / path).read_text() == text
    for rank in (0, 1):
        env, command = log(run, rank).splitlines()
        env = {k: v.replace(run.name, plan["run_id"]) for k, v in json.loads(env).items()}
        expected = {**plan["env"], **plan["rank_env"][rank]}
        expected["MASTER_PORT"] = env["MASTER_PORT"]
        assert {k: env[k] for k in expected} == expected
        assert eval(command) == plan["command"]


def test_a_rank_that_floods_its_output_still_stops(launch):
    script(launch.folder, "import os\nwhile True: os.write(1, b'\\n' * 65536)")
    process = launch.start("work.py", "--procs", 1, "--json")
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    wait_until(lambda: any(p.stat().st_size > 10**5 for p in launch.folder.glob("runs/*/attempts/1/logs/0.log")))
    process.terminate()
    assert process.wait(timeout=60) == 75
    drain.join()


def test_an_unfinished_line_is_shown(launch):
    script(launch.folder, "import sys, time\nfor i in range(40): sys.stdout.write(f'\\r{i} of 40'); time.sleep(0.1)")
    process = launch.start("work.py", "--procs", 1)
    wait_until(lambda: any(" of 40" in p.read_text() for p in launch.folder.glob("runs/*/attempts/1/logs/0.log")),
               process=process)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)


def test_one_of_two_concurrent_resumes_wins(launch):
    script(launch.folder, "import os, time\nif os.environ['LAUNCH_ATTEMPT'] == '1': raise SystemExit(1)\n"
           "while not os.path.exists('go'): time.sleep(0.02)")
    assert launch("work.py", "--procs", 1).returncode == 1
    run = launch.run()
    both = [launch.start("resume", run.name) for _ in range(2)]
    wait_until(lambda: any(process.poll() is not None for process in both))
    (launch.folder / "go").touch()
    ends = [(*process.communicate(timeout=60), process.returncode) for process in both]
    assert sorted(code for *_, code in ends) == [0, 2]
    assert len(list((run / "attempts").iterdir())) == 2 and record(run)["state"] == "finished"


def test_a_run_of_a_lost_host_can_be_taken_over(launch):
    script(launch.folder, "print('done')")
    assert launch("work.py", "--procs", 1).returncode == 0
    run = launch.run()
    job = {**record(run)["job"], "host": "gone"}
    (run / "run.json").write_text(json.dumps({**record(run), "state": "running", "job": job}))
    refused = launch("resume", run.name)
    assert refused.returncode == 2 and "is running on host gone" in refused.stderr and "--take-over" in refused.stderr
    assert launch("resume", run.name, "--take-over").returncode == 0


@pytest.mark.slow
def test_a_rank_that_saves_has_the_whole_grace_although_another_rank_is_gone(launch):
    script(launch.folder, "import os, signal, sys, time\n"
           "def save(*_):\n    time.sleep(7); print('saved', flush=True); sys.exit(75)\n"
           "if os.environ['RANK'] == '0': signal.signal(signal.SIGTERM, save)\n"
           "print('up', flush=True); time.sleep(600)")
    process = launch.start("work.py", "--procs", 2)
    wait_until(lambda: sum(bool(p.read_text()) for p in launch.folder.glob("runs/*/attempts/1/logs/*.log")) == 2)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "saved" in out and "starts the script again from its first line" in out


def test_megabytes_without_a_line_end_become_a_short_error(launch):
    script(launch.folder, "import sys\nsys.stderr.write('x' * 5_000_000)\nsys.stderr.flush()\nsys.exit(3)\n")
    done = launch("work.py", "--procs", 1)
    assert done.returncode == 3 and len(done.stderr) < 2_000
    run = launch.run()
    assert attempt(run, 1)["failure"]["message"].startswith("rank 0 ended with exit code 3: xxx")
    assert len((run / "attempts/1/attempt.json").read_text()) < 3_000
    assert log(run, 0).count("x") == 5_000_000, "the log has all of it"
    assert len(launch("explain", run.name, "--json").stdout) < 20_000


def test_what_a_script_prints_after_a_handled_traceback_is_kept_for_explain(launch):
    script(launch.folder, "import os, traceback\ntry: raise ValueError('handled')\nexcept ValueError: traceback.print_exc()\n"
           "for i in range(60): print('line', i)\nprint('CUDA error: uncorrectable ECC error', flush=True)\nos.abort()\n")
    assert launch("work.py", "--procs", 1).returncode == 1
    said = launch("explain", launch.run().name).stdout
    assert "a GPU or its driver does not work properly" in said and "uncorrectable ECC error" in said


def test_a_traceback_within_a_line_is_not_a_traceback(launch):
    script(launch.folder, "import sys\nprint('log: caught Traceback (most recent call last): handled')\nsys.exit(2)\n")
    assert launch("work.py", "--procs", 1).returncode == 2
    assert attempt(launch.run(), 1)["failure"]["traceback"] is None


def test_quitting_the_debugger_is_a_stop_without_a_traceback(launch):
    script(launch.folder, "import bdb\nraise bdb.BdbQuit\n")
    done = launch("work.py", "--debug")
    assert done.returncode == 130 and "Traceback" not in done.stderr + done.stdout
    assert record(launch.run())["state"] == "preempted"
