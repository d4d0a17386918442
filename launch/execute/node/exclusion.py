"""Nodes that a job goes on without."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cluster import slurm
from launch.execute.node.place import Place
from trainers.contract.errors import UserError


def down_nodes(nodes: list[str]) -> dict[str, str]:
    """Which of these nodes SLURM holds to be down, and why; none where it cannot be asked."""
    try:
        states = slurm.node_states(nodes)
    except UserError:  # in a container there may be no sinfo
        return {}
    return {node: f"{state}{f', {reason}' if reason else ''}" for node, (state, reason) in states.items()
            if slurm.is_down(state)}


def exclude(folder: Path, place: Place, nodes: list[str], requeued: bool = False) -> None:
    """Let the job begin anew without these nodes, unless too few would be left. Before it is requeued (by the batch
    shell, which reads the file) SLURM would not hear of it; after a requeue of SLURM's own it must be told at once."""
    file = folder / f"exclude-{place.job}"
    try:
        excluded = {*nodes, *(file.read_text().split(",") if file.exists() else [])}
        # Refused if what is left could never run this job.
        slurm.call("sbatch", "--test-only", f"--exclude={','.join(sorted(excluded))}", str(folder / "job.sh"))
        file.write_text(",".join(sorted(excluded)))
        if requeued:
            slurm.exclude(place.job, sorted(excluded))
    except (OSError, UserError) as error:
        print(f"warning: {', '.join(nodes)} could not be excluded: {error}", file=sys.stderr)
