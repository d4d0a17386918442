"""What nodes without internet cannot download is fetched beforehand, where one submits."""

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

# Of the nodes alone, where a cluster's `env` says so.
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def missing(spec: Spec, cluster: ClusterConfig) -> list[str]:
    """What the run's ranks would have to download on this cluster, in words. A script's is not known: nothing."""
    return spec.config.missing(_environment(cluster)) if hasattr(spec.config, "task") else []


def prefetch(spec: Spec, cluster: ClusterConfig, output: TextIO | None = None) -> int:
    """Download what the run's ranks would to where they will look. In a process of its own, since `launch` imports
    no torch; it says what is where now in lines to `output` (standard output), and what went wrong to standard error.

    Returns: its exit code: 0, or 2 for what the user must mend.

    Raises:
        UserError: the run is a script's, or the process was killed.
    """
    if not hasattr(spec.config, "task"):
        raise UserError(f"`{spec.name}` is a script, which fetches its own data",
                        "run the part of it that downloads where there is internet")
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        file = Path(folder, "run.yaml")
        file.write_text(spec.text, encoding="utf-8")
        code = subprocess.run([sys.executable, "-P", "-m", "trainers.prefetch", str(file)], env=_environment(cluster),
                              stdin=subprocess.DEVNULL, stdout=output, check=False).returncode
    if code < 0:
        raise UserError(f"fetching was ended by {signal.Signals(-code).name}",
                        "the kernel ends processes this way when memory runs out" if code == -signal.SIGKILL else None)
    return code


def _environment(cluster: ClusterConfig) -> dict[str, str]:
    """The ranks', as far as it says where data lies."""
    data = {"LAUNCH_DATA": cluster.data} if cluster.data else {}
    return {key: value for key, value in {**os.environ, **data, **cluster.env}.items() if key not in OFFLINE}
