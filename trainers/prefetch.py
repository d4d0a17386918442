"""Downloads what the ranks of a run would, where they cannot:

    python -P -m trainers.prefetch RUN_YAML
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainers.config.spec import read_spec, resolve
from trainers.contract import exit_codes
from trainers.contract.errors import UserError


def prefetch(file: Path) -> list[str]:
    """What a run's task says of its downloads, a line each. Raises UserError."""
    config = read_spec(file)
    if not hasattr(config, "task"):
        raise UserError(f"{file} is the spec of a script, which fetches its own data")
    task_class = resolve(config.task, config.path)
    if not hasattr(task_class, "prefetch"):
        raise UserError(f"`task` is `{config.task}`, which is no subclass of trainers.engine.task.Task",
                        f"write `class {config.task.partition(':')[2]}(Task)`")
    return task_class(config).prefetch() or [f"{config.name} downloads nothing"]


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m trainers.prefetch RUN_YAML", file=sys.stderr)
        return exit_codes.USER_ERROR
    try:
        print(*prefetch(Path(argv[0])), sep="\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return exit_codes.KILLED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
