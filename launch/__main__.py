"""The `launch` command; `python -m launch` is the same."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from trainers.contract.streams import prepare_streams

    prepare_streams()
    from launch.cli.main import main as run

    sys.exit(run())


if __name__ == "__main__":
    # Python puts the working folder first on sys.path. A user's `trainers/` folder there would shadow ours.
    if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[1]:
        del sys.path[0]
    main()
