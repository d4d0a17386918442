"""Real ranks over gloo that stay, for tests of what ranks do together: they import torch once.

A test module is its own ranks' program: `Ranks(4, __file__)` starts it four times, `serve(globals())` at its end
makes each answer calls of its functions `function(world, **arguments)` with what they return, as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback


class Ranks:
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
        """The function's results by rank."""
        for process in self.processes:
            process.stdin.write(json.dumps([function, arguments], default=str) + "\n")
            process.stdin.flush()
        answers = [json.loads(process.stdout.readline() or '["died", null]') for process in self.processes]
        assert all(error is None for error, _ in answers), "\n".join(str(error) for error, _ in answers)
        return [value for _, value in answers]

    def close(self) -> None:
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
    import torch.distributed as dist

    from trainers.engine.world import World

    made, new_group = [], dist.new_group

    def noted(*args, **kwargs):
        group = new_group(*args, **kwargs)
        if sys._getframe(1).f_globals["__name__"].startswith("trainers."):  # DeepSpeed keeps its own, and takes them again
            made.append(group)
        return group

    dist.new_group = noted
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything prints goes elsewhere
    world = World.from_env()
    if world.size > 1:  # one rank needs no group, whose threads would hinder it from forking
        world.start_process_group()
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = None, functions[function](world, **arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        while made:  # each would keep three threads, which look about a hundred times a second
            dist.destroy_process_group(made.pop())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    answers.flush()
    os._exit(0)
