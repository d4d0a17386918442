"""Download, on the submitting host, the data that nodes without internet access cannot download."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trainers.contract.errors import UserError

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from launch.plan.spec import Spec

# A cluster's `env` may set these for its nodes. They must not apply to the download.
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def missing(spec: Spec, cluster: ClusterConfig) -> list[str]:
    """What the run's ranks would have to download on this cluster, as text. Empty for a script, whose data is unknown."""
    return spec.config.missing(_environment(cluster)) if hasattr(spec.config, "missing") else []


def prefetch(spec: Spec, cluster: ClusterConfig, output: TextIO | None = None) -> int:
    """Download the data that the run's ranks will need, to the place where the ranks will look for it.

    A separate process does this, since `launch` imports no torch. It writes where the data is to `output` (by default
    standard output), and errors to standard error.

    Returns:
        The exit code of the process: 0, or 2 if the user must fix something.

    Raises:
        UserError: the run executes a script, or the process was killed.
    """
    if not hasattr(spec.config, "task"):
        raise UserError(f"`{spec.name}` is a script, which fetches its own data",
                        "run the script's own download on a host with internet access")
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        file = Path(folder, "run.yaml")
        file.write_text(spec.text, encoding="utf-8")
        code = subprocess.run([sys.executable, "-P", "-m", "trainers.prefetch", str(file)], env=_environment(cluster),
                              stdin=subprocess.DEVNULL, stdout=output, check=False).returncode
    if code < 0:
        raise UserError(f"the download was ended by {signal.Signals(-code).name}",
                        "the kernel ends processes this way when memory runs out" if code == -signal.SIGKILL else None)
    return code


def _environment(cluster: ClusterConfig) -> dict[str, str]:
    """The variables of the ranks' environment that say where data is, without those that forbid downloads."""
    data = {"LAUNCH_DATA": cluster.data} if cluster.data else {}
    return {key: value for key, value in {**os.environ, **data, **cluster.env}.items() if key not in OFFLINE}
