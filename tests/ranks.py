"""Real ranks over gloo that stay alive between tests, so that each rank imports torch only once.

A test module is also the program of its ranks. `Ranks(4, __file__)` starts the module four times; the fixture `ranks` does so.
The module ends with `serve(globals())`, which makes each rank wait for calls of functions of the module. A function is called as
`function(world, **arguments)`, and what it returns is sent back as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback


class Ranks:
    """`size` rank processes that run the Python file `program`."""

    def __init__(self, size: int, program: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": str(size),
                  "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                  "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
        self.processes = [subprocess.Popen([sys.executable, program], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                          for rank in range(size)]

    def __call__(self, function: str, **arguments) -> list:
        """Call a function on every rank and return the results, in the order of the ranks."""
        for process in self.processes:
            process.stdin.write(json.dumps([function, arguments], default=str) + "\n")
            process.stdin.flush()
        answers = [json.loads(process.stdout.readline() or '["died", null]') for process in self.processes]
        assert all(error is None for error, _ in answers), "\n".join(str(error) for error, _ in answers)
        return [value for _, value in answers]

    def close(self) -> None:
        """End the ranks; kill those that do not end within 20 s."""
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def serve(functions: dict) -> None:
    """Be a rank: answer calls from standard input until it is closed, then exit."""
    import torch.distributed as dist

    from trainers.engine.world import World

    groups, new_group = [], dist.new_group

    def recording_new_group(*args, **kwargs):
        group = new_group(*args, **kwargs)
        # Only the groups of `trainers`: DeepSpeed keeps its groups and uses them again.
        if sys._getframe(1).f_globals["__name__"].startswith("trainers."):
            groups.append(group)
        return group

    dist.new_group = recording_new_group
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # printed text goes to standard error, so that the pipe holds only answers
    world = World.from_env()
    if world.size > 1:  # a single rank needs no process group, and a process with the threads of a group must not fork
        world.start_process_group()
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = None, functions[function](world, **arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        while groups:  # each group keeps three threads, which wake about a hundred times a second
            dist.destroy_process_group(groups.pop())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    answers.flush()
    os._exit(0)
