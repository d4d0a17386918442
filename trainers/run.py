"""A rank's entry point: read run.yaml, build the task, and train. A task without steps (a search) runs itself.

    python -P -m trainers.run RUN_DIR

A rank needs only the run directory and torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT). `launch`, `torchrun` and `accelerate launch` can therefore all start ranks. Three more variables are optional:

    LAUNCH_ATTEMPT      number of the attempt that this rank belongs to
    LAUNCH_DEBUG        if not empty: turn on anomaly detection, and leave Ctrl-C to the debugger
    LAUNCH_HEARTBEAT    see trainers/contract/heartbeat.py
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config import determinism, micro_batch
from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig
from trainers.config.spec import read_run, resolve
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.contract.signals import Stopped, hold, listen
from trainers.contract.streams import prepare_streams
from trainers.runner import Place, Runner

if TYPE_CHECKING:
    from trainers.engine.world import World


def run(paths: RunPaths, attempt: int | None) -> int:
    """Run one rank and return its exit code.

    Raises:
        UserError: the run cannot start or cannot continue.
    """
    debugging = bool(os.environ.get("LAUNCH_DEBUG"))
    if not debugging:  # under a debugger, Ctrl-C belongs to the debugger
        listen()
    config = read_run(paths)
    assert not isinstance(config, ScriptConfig), "`launch` starts scripts directly, without this module"
    task_class = resolve(config.task, config.path)
    if isinstance(config, SearchConfig):
        return _run_search(task_class, config, paths, attempt)
    import torch

    if config.eval.rows is not None:
        from trainers.engine.rows.predict import predict as work
    elif config.eval.only:
        from trainers.engine.evaluate_only import evaluate_only as work
    else:
        from trainers.engine.loop import train as work
    from trainers.engine.failures import out_of_memory, without_deterministic_kernel, work_without_memory
    from trainers.engine.task import Task
    from trainers.engine.world import World

    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise UserError(f"`task` is `{config.task}`, which is not a subclass of trainers.engine.task.Task",
                        f"write `class {config.task.partition(':')[2]}(Task)`")
    torch.autograd.set_detect_anomaly(debugging)
    world = World.from_env()
    settled = _settled(config, paths, world)
    try:
        return work(task_class(settled), settled, world, paths, attempt)
    except Exception as error:
        operation = without_deterministic_kernel(error)
        if operation is None and not out_of_memory(error):
            raise
        traceback.print_exc()
        if operation is not None:
            raise determinism.without_kernel(paths, attempt, world.rank, operation) from error
        raise micro_batch.out_of_memory(config, settled, paths, attempt, world.rank, world.size,
                                        work_without_memory(error)) from error


def _settled(config: RunConfig, paths: RunPaths, world: World) -> RunConfig:
    """Return the config with what earlier attempts have found out about the micro-batch size and about determinism.

    The ranks agree, because a network file system may not show yet what another node has just written. Collective.
    """
    notes = []
    settled = micro_batch.settled(config, paths, world.size)
    if settled is not config:
        batching = settled.batching(world.size)
        size = world.minimum(batching.micro)
        # A rank's part of a batch of tokens is its share only about: a limit would often cut it in two.
        settled = micro_batch.with_size(settled, None if batching.tokens and size == batching.share else size)
        notes.append(("info", micro_batch.note(settled, paths, world.size)))
    if config.train.deterministic is True and not world.minimum(int(determinism.found(paths) is None)):
        settled = determinism.with_warnings(settled)
        notes.append(("warning", determinism.note(paths)))
    for level, message in notes if world.main else ():
        events.emit({"event": "note", "level": level, "message": message})
    return settled


def _run_search(task_class: type, config: SearchConfig, paths: RunPaths, attempt: int | None) -> int:
    """Run a task without steps, without importing torch. Return the exit code."""
    if not (isinstance(task_class, type) and issubclass(task_class, Runner)):
        raise UserError(f"`task` is `{config.task}`, which is not a subclass of trainers.runner.Runner",
                        f"write `class {config.task.partition(':')[2]}(Runner)`")
    return task_class(config).run(Place.from_env(os.environ), paths, attempt)


def main(argv: list[str]) -> int:
    folder = argv[0] if argv else os.environ.get("LAUNCH_RUN_DIR")
    if folder is None:
        print("usage: python -m trainers.run RUN_DIR", file=sys.stderr)
        return exit_codes.USER_ERROR
    attempt = os.environ.get("LAUNCH_ATTEMPT")
    prepare_streams()
    heartbeat.start()
    try:
        code = run(RunPaths(Path(folder).absolute()), int(attempt) if attempt else None)
        heartbeat.end()
        return code
    except Stopped:
        # End by SIGTERM, as a process that does not listen yet would. The other ranks may be blocked where no handler runs.
        # The node process sees that this rank has ended, and stops the others soon.
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
    if "torch" in sys.modules:  # exit at once: a normal exit may wait for a collective in which other ranks hang
        os._exit(code)
    sys.exit(code)
