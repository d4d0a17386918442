"""Download what the ranks of a run need, where ranks cannot download it themselves:

    python -P -m trainers.prefetch RUN_YAML
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainers.config.schema import ScriptConfig
from trainers.config.spec import read_spec, resolve
from trainers.contract import exit_codes
from trainers.contract.errors import UserError


def prefetch(file: Path) -> list[str]:
    """Let a run's task download what it needs. Return lines that say what was downloaded and where it is.

    Raises:
        UserError: the spec is wrong, or a download fails.
    """
    config = read_spec(file)
    if isinstance(config, ScriptConfig):
        raise UserError(f"`{file}` is the spec of a script, which fetches its own data")
    task_class = resolve(config.task, config.path)
    if not hasattr(task_class, "prefetch"):
        raise UserError(f"`task` is `{config.task}`, which is not a subclass of trainers.engine.task.Task",
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
