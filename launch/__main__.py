"""The `launch` command; `python -m launch` is the same."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def _find_own_packages() -> None:
    """Let this process, and the processes that it starts, import launch's own `trainers` if PYTHONPATH holds another one.

    A script's ranks do not get the changes: see `Plan.inherited`.
    """
    own = Path(__file__).parents[1]
    found = importlib.util.find_spec("trainers")
    if found is not None and found.origin == str(own / "trainers" / "__init__.py"):
        return
    sys.path.insert(0, str(own))
    for name in ("PYTHONPATH", "LAUNCH_CODE"):
        os.environ[name] = os.pathsep.join([str(own), *filter(None, [os.environ.get(name)])])


def main() -> None:
    _find_own_packages()
    from trainers.contract.streams import prepare_streams

    prepare_streams()
    from launch.cli.main import main as run

    sys.exit(run())


if __name__ == "__main__":
    # Python puts the working folder first on sys.path. A user's `trainers/` folder there would shadow ours.
    if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[1]:
        del sys.path[0]
    main()
