"""A rank's entry point: read run.yaml, build the task, hand it to the loop, or let it run itself.

    python -P -m trainers.run RUN_DIR

The run directory and torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT) are all a rank needs: `launch`, `torchrun` and `accelerate launch` start it alike.
LAUNCH_ATTEMPT, where set, is the attempt that this rank belongs to; LAUNCH_DEBUG asks for anomaly detection;
LAUNCH_HEARTBEAT: see trainers/contract/heartbeat.py.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from trainers.config import micro_batch
from trainers.config.schema import SearchConfig
from trainers.config.spec import read_run, resolve
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.contract.signals import Stopped, hold, listen
from trainers.runner import Place, Runner


def run(paths: RunPaths, attempt: int | None) -> int:
    """One rank, from its spec to its exit code. Raises UserError."""
    debugging = bool(os.environ.get("LAUNCH_DEBUG"))
    if not debugging:  # there, the terminal's Ctrl-C is the debugger's
        listen()
    config = read_run(paths)
    task_class = resolve(config.task, config.path)
    if isinstance(config, SearchConfig):
        return _run_itself(task_class, config, paths, attempt)
    import torch

    if config.eval.only:
        from trainers.engine.evaluate_only import evaluate_only as work
    else:
        from trainers.engine.loop import train as work
    from trainers.engine.task import Task
    from trainers.engine.world import World, out_of_memory

    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise UserError(f"`task` is `{config.task}`, which is no subclass of trainers.engine.task.Task",
                        f"write `class {config.task.partition(':')[2]}(Task)`")
    torch.autograd.set_detect_anomaly(debugging)
    world = World.from_env()
    settled = micro_batch.settled(config, paths, world.size)
    if settled is not config:
        settled = micro_batch.with_size(settled, world.least(settled.train.micro_batch_size))
        if world.main:
            events.emit({"event": "note", "level": "info", "message": micro_batch.note(settled, paths, world.size)})
    try:
        return work(task_class(settled), settled, world, paths, attempt)
    except Exception as error:
        if config.eval.only or not out_of_memory(error):
            raise
        traceback.print_exc()
        raise micro_batch.too_large(config, settled, paths, attempt, world.rank, world.size) from error


def _run_itself(task_class: type, config: SearchConfig, paths: RunPaths, attempt: int | None) -> int:
    """A task without steps, which needs no torch."""
    if not (isinstance(task_class, type) and issubclass(task_class, Runner)):
        raise UserError(f"`task` is `{config.task}`, which is no subclass of trainers.runner.Runner",
                        f"write `class {config.task.partition(':')[2]}(Runner)`")
    return task_class(config).run(Place.from_env(os.environ), paths, attempt)


def main(argv: list[str]) -> int:
    folder = argv[0] if argv else os.environ.get("LAUNCH_RUN_DIR")
    if folder is None:
        print("usage: python -m trainers.run RUN_DIR", file=sys.stderr)
        return exit_codes.USER_ERROR
    attempt = os.environ.get("LAUNCH_ATTEMPT")
    heartbeat.start()
    try:
        return run(RunPaths(Path(folder).absolute()), int(attempt) if attempt else None)
    except Stopped:
        # As a process that was not listening yet would end: the others may wait where no handler runs, and the
        # node process does not let those wait long.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    except UserError as error:
        hold()
        events.emit({"event": "error", "message": error.message, "hint": error.hint, "exit_code": error.exit_code,
                     "retry": error.retry})
        return error.exit_code


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:  # at once: other ranks may hang in a collective that a normal exit would wait for
        os._exit(code)
    sys.exit(code)
