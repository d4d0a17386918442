"""A real, private SLURM cluster on this host, for tests: munged, slurmctld, and one slurmd for each node.

    with cluster(nodes=3, gpus=8) as slurm:
        slurm.run("sbatch", "--wrap", "hostname")

All files are in one temporary folder. A keeper process starts the daemons. When `with` ends, or when the process that
entered `with` dies for any reason, the keeper kills all its descendants by pid (the daemons and the jobs' processes) and
removes the folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
DAEMONS = {"munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"}
SBIN = "/usr/sbin:/usr/local/sbin"  # where the daemons are installed; often missing from PATH
END_STATES = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "BOOT_FAIL"}

# cred_expire: also how long a requeued job waits before it may start again (default 120 s).
# NoInAddrAny, NoCtldInAddrAny: the daemons listen on loopback only.
# config_overrides: a node has the CPUs, memory and GPUs of its NodeName line, not those of this host.
# In the NodeName lines: NodeHostname=localhost and a Port let slurmctld reach every node on this host.
CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_wait_s}
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
DefMemPerCPU=500
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
SlurmdTimeout=12
MessageTimeout=6
{extra}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=30:00 PriorityTier=1
PartitionName=short Nodes=ALL MaxTime=3:00 DefaultTime=1:00 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 DefaultTime=30:00 PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Return the programs that a cluster needs and this host does not have."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@dataclass
class Cluster:
    """A running cluster. A command needs the variables of `env` to find the cluster."""

    folder: Path
    nodes: list[str]
    keeper: subprocess.Popen
    ports: dict[str, int]  # daemon -> port; the key of a slurmd is its node's name
    pids: dict[str, int] = field(default_factory=dict)  # daemon -> pid, with the same keys

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *args: object, check: bool = True, timeout_s: float = 60, cwd: Path | None = None, **env: str) -> str:
        """Run a SLURM command and return its standard output.

        Raises:
            RuntimeError: the command failed and `check` is True; the message contains the command's output
        """
        done = self.try_run(*args, timeout_s=timeout_s, cwd=cwd, **env)
        if check and done.returncode:
            raise RuntimeError(f"`{' '.join(map(str, args))}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def try_run(
        self, *args: object, timeout_s: float = 60, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command and return the finished process, whatever its exit code."""
        return subprocess.run(
            [*map(str, args)], env=without_slurm_variables(os.environ) | self.env | env, cwd=cwd or self.folder, text=True,
            capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
        )

    def job(self, job_id: object) -> dict[str, str]:
        """Return the fields of `scontrol show job` for a job or an array element (`12_3`); empty when SLURM has forgotten it."""
        return next(iter(self.jobs(job_id)), {})

    def jobs(self, *job_id: object) -> list[dict[str, str]]:
        """Return all jobs that slurmctld remembers, or all elements of one array."""
        lines = self.try_run("scontrol", "show", "job", "-o", *job_id).stdout.splitlines()
        return [_fields(line) for line in lines if line.startswith("JobId=")]

    def node(self, name: str) -> dict[str, str]:
        """Return the fields of `scontrol show node`."""
        return _fields(self.run("scontrol", "show", "node", "-o", name))

    def wait(self, job_id: object, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in one of `states` (default: any state of an ended job) and return the job's fields."""
        wanted = states or tuple(END_STATES)
        return self._wait(lambda: (job := self.job(job_id)).get("JobState") in wanted and job, timeout_s,
                          lambda: f"job {job_id} is not {' or '.join(wanted)}: {self.job(job_id)}")

    def start_now(self, job_id: object) -> None:
        """Let a job start now that waits for its begin time. A requeued job has such a time."""
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def wait_until_requeued(self, job_id: object, timeout_s: float = 120) -> None:
        """Wait until a job is in the queue again, all its processes have ended, and `start_now` can start it."""
        self._wait(lambda: (job := self.job(job_id)).get("JobState") == "PENDING" and job["Reason"] == "BeginTime", timeout_s,
                   lambda: f"job {job_id} was not requeued: {self.job(job_id)}")
        time.sleep(1.5)  # a node refuses to start a job in the second in which its last job ended

    def shorten_time_limit(self, job_id: object) -> None:
        """Lower a running job's time limit, so that the signal before the limit comes within about a minute.

        The signal comes about 50 s before the limit. SLURM counts limits in minutes and checks every 30 s. The new limit
        leaves time for one check before the limit has passed.
        """
        hours, minutes, seconds = map(int, self.job(job_id)["RunTime"].split(":"))
        ran_s = 3600 * hours + 60 * minutes + seconds
        self.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={(ran_s + 40) // 60 + 1}")

    def wait_idle(self, timeout_s: float = 120) -> None:
        """Wait until no job is queued or running and all nodes are idle."""
        self._wait(self._is_idle, timeout_s, self._not_idle_message)

    def clean(self, timeout_s: float = 60) -> None:
        """End all jobs, start the daemons that are down, and wait until all nodes are idle."""
        if not _is_alive(self.pids["slurmctld"]):
            self.start_slurmctld()
        for name in self.nodes:
            if not _is_alive(self.pids[name]):
                self.start_slurmd(name)
        for name, state in self._node_states().items():
            if state.startswith(("down", "drain")):
                self.try_run("scontrol", "update", f"NodeName={name}", "State=RESUME")

        def all_ended() -> bool:
            if queued := self.run("squeue", "-h", "-o", "%A").split():
                self.try_run("scancel", *queued)
            names = {pid: _name(pid) for pid in descendants(self.keeper.pid)}
            jobs = [pid for pid in names if names[pid] not in DAEMONS]
            for pid in [pid for pid in jobs if names[pid] != "srun"] or jobs:  # slurmstepd waits for its srun
                _kill(pid)
            return self._is_idle()

        self._wait(all_ended, timeout_s, self._not_idle_message)

    def kill_slurmd(self, node: str, steps: bool = False) -> None:
        """Kill a node's slurmd by SIGKILL. With `steps`, also kill its slurmstepds and their processes, as when a host dies."""
        pid = self.pids[node]
        self._kill_and_wait(pid, *(p for stepd in self.stepds(node) for p in [stepd, *descendants(stepd)] if steps))

    def start_slurmd(self, node: str, *wrapper: str, wait: bool = True) -> None:
        """Start a node's slurmd. `wrapper` is a command that starts the slurmd, such as `unshare -m`."""
        self.pids[node] = self._start(node, *wrapper, _which("slurmd"), "-D", "-N", node, "-f", str(self.conf))
        if wait:
            self._wait(lambda: _is_listening(self.ports[node]), 30, lambda: f"slurmd of {node} does not listen:{self._logs()}")
            self.wait_until_up([node])

    def kill_slurmctld(self) -> None:
        """Kill slurmctld by SIGKILL. Jobs continue, commands get no answer, and slurmctld may forget its last five seconds."""
        self._kill_and_wait(self.pids["slurmctld"])

    def start_slurmctld(self) -> None:
        """Start slurmctld. It still knows its earlier jobs."""
        pid = self.pids["slurmctld"] = self._start("slurmctld", _which("slurmctld"), "-D", "-f", str(self.conf))

        def answers() -> bool:
            if not _is_alive(pid):
                raise RuntimeError(f"slurmctld ended:{self._logs()}")
            return _is_listening(self.ports["slurmctld"]) and self.try_run("scontrol", "ping").returncode == 0

        self._wait(answers, 30, lambda: f"slurmctld does not answer:{self._logs()}")

    def stepds(self, node: str) -> list[int]:
        """Return the pids of a node's slurmstepds. They outlive their slurmd."""
        log = f"{self.folder}/log/{node}.log"  # each slurmstepd of the node writes to this file
        return [pid for pid in descendants(self.keeper.pid) if _name(pid) == "slurmstepd" and log in _open_files(pid)]

    def wait_until_up(self, nodes: Iterable[str], timeout_s: float = 60) -> None:
        """Wait until the nodes can take jobs."""
        wanted = set(nodes)
        ready = ("idle", "mixed", "allocated", "completing")
        self._wait(lambda: {name for name, state in self._node_states().items() if state in ready} >= wanted, timeout_s,
                   lambda: f"not all nodes are up: {self.run('sinfo', '-N', '-l')}{self._logs()}")

    def _node_states(self) -> dict[str, str]:
        """Return the long state of each node. A `*` after the state means that the node does not answer."""
        done = self.try_run("sinfo", "-h", "-N", "-o", "%N %T")
        return dict(line.split() for line in done.stdout.splitlines())

    def _is_idle(self) -> bool:
        return not self.run("squeue", "-h") and set(self._node_states().values()) == {"idle"}

    def _not_idle_message(self) -> str:
        return f"the cluster is not idle: {self.run('squeue')}{self.run('sinfo', '-N', '-l')}"

    def _start(self, name: str, *argv: str) -> int:
        """Start a daemon as a child of the keeper and return its pid."""
        env = without_slurm_variables(os.environ) | self.env
        request = {"argv": argv, "env": env, "log": f"{self.folder}/log/{name}.err"}
        print(json.dumps(request), file=self.keeper.stdin, flush=True)
        if not (pid := self.keeper.stdout.readline()):
            raise RuntimeError(f"the keeper could not start {argv[0]}")
        return int(pid)

    def _kill_and_wait(self, *pids: int) -> None:
        for pid in pids:
            _kill(pid)
        self._wait(lambda: not any(map(_is_alive, pids)), 20, lambda: f"some of {pids} are still alive after SIGKILL")

    def _wait(self, condition, timeout_s: float, message):
        """Wait for the first true value of `condition()` and return it; on a timeout, raise with `message()`."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {timeout_s} s: {message()}")
            time.sleep(0.1)
        return value

    def _logs(self) -> str:
        """Return the last lines of all daemons' logs."""
        logs = sorted(self.folder.glob("log/*.err"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.stat().st_size)


@contextmanager
def cluster(
    nodes: int = 3, gpus: int = 8, cpus: int = 16, extra: str = "", requeue_wait_s: int = 10, folder: Path | None = None
) -> Iterator[Cluster]:
    """A running cluster with nodes n1, n2, ...

    `extra` is added to slurm.conf. `folder` replaces the new temporary folder.
    """
    names = [f"n{i + 1}" for i in range(nodes)]
    with ExitStack() as stack:
        folder = folder or Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a short path, because unix sockets are in it
        keeper = subprocess.Popen(
            [sys.executable, "-P", __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C in the terminal must not reach the keeper
        )
        stack.callback(keeper.wait)
        stack.callback(keeper.stdout.close)
        stack.callback(keeper.stdin.close)  # ends the keeper
        daemons = ["slurmctld", *names]
        slurm = Cluster(folder, names, keeper, dict(zip(daemons, free_ports(len(daemons)))))
        _write_files(slurm, gpus, cpus, extra, requeue_wait_s)
        munge = folder / "munge"
        slurm.pids["munged"] = slurm._start(
            "munged", _which("munged"), "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=4",
        )
        slurm._wait((munge / "socket").exists, 20, lambda: f"munged did not start:{slurm._logs()}")
        slurm.start_slurmctld()
        for name in names:
            slurm.start_slurmd(name, wait=False)
        slurm.wait_until_up(names, timeout_s=60 + 4 * nodes)
        yield slurm


def _write_files(slurm: Cluster, gpus: int, cpus: int, extra: str, requeue_wait_s: int) -> None:
    """Write the files that the daemons need."""
    folder, names = slurm.folder, slurm.nodes
    folder.chmod(0o755)
    for path in (folder / "munge", folder / "state", folder / "gpus", folder / "log", *(folder / name for name in names)):
        path.mkdir()
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    for i in range(gpus):
        (folder / "gpus" / f"gpu{i}").symlink_to("/dev/null")  # SLURM requires a device file
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    lines = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={slurm.ports[name]} CPUs={cpus} "
        f"RealMemory=64000{gres}" for name in names
    ]
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpus/gpu[0-{gpus - 1}]\n" if gpus else "")
    slurm.conf.write_text(CONF.format(
        host=socket.gethostname().split(".")[0], port=slurm.ports["slurmctld"], user=pwd.getpwuid(os.getuid()).pw_name,
        folder=folder, requeue_wait_s=requeue_wait_s, extra=extra, nodes="\n".join(lines),
    ))


def _is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Return free ports below the ranges of ranks and of the kernel, so that a restarted slurmd finds its port still free.

    Each pytest-xdist worker has its own range.
    """
    low = 10_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10)
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            server = stack.enter_context(socket.socket())
            try:
                server.bind(("127.0.0.1", random.randrange(low, low + 1_000)))
            except OSError:
                continue
            ports.append(server.getsockname()[1])
        return ports


def without_slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` without the variables that SLURM's commands read, and with the daemons' folders on PATH."""
    return {k: v for k, v in env.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_", "SALLOC_"))} | {"PATH": _path()}


def descendants(pid: int) -> list[int]:
    """Return the pids of a process's children, of their children, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    result, todo = [], [pid]
    while todo:
        todo += (more := children.get(todo.pop(), []))
        result += more
    return result


def _fields(line: str) -> dict[str, str]:
    """Parse `A=1 B=x y C=2`. A value may contain spaces, a name never does."""
    fields: dict[str, str] = {}
    key = ""
    for word in line.strip().split(" "):
        name, equals, value = word.partition("=")
        if equals and re.fullmatch(r"[\w:/]+", name) and name[:1].isupper():
            key = name
            fields[key] = value
        elif key:
            fields[key] += f" {word}"
    return fields


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{SBIN}"


def _which(program: str) -> str:
    return shutil.which(program, path=_path()) or program


def _open_files(pid: int) -> list[str]:
    try:
        return [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def keep(folder: Path) -> None:
    """Run as the keeper: start one process for each line of standard input; at the end of input, kill all descendants."""
    ctypes.CDLL(None, use_errno=True).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphaned descendants become children of the keeper
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended children

    def reset_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)

    try:
        for line in sys.stdin:
            request = json.loads(line)
            with open(request["log"], "ab") as log:
                child = subprocess.Popen(request["argv"], env=request["env"], cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                                         stderr=log, preexec_fn=reset_signals)
            print(child.pid, flush=True)
    finally:
        for _ in range(2):  # one scan of /proc can miss a process that gets a new parent during the scan
            while pids := descendants(os.getpid()):
                for pid in pids:
                    _kill(pid)
                time.sleep(0.02)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
