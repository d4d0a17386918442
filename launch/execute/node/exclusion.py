"""Nodes that a job must avoid when it starts again."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cluster import slurm
from launch.execute.node.place import Place
from trainers.contract.errors import UserError


def down_nodes(nodes: list[str]) -> dict[str, str]:
    """The state and the reason of each of these nodes that is down, by node. Empty if SLURM cannot be asked."""
    try:
        states = slurm.node_states(nodes)
    except UserError:  # in a container there may be no sinfo
        return {}
    return {node: f"{state}{f', {reason}' if reason else ''}" for node, (state, reason) in states.items()
            if slurm.is_down(state)}


def exclude(folder: Path, place: Place, nodes: list[str], requeued: bool = False) -> None:
    """Exclude these nodes when the job starts again, unless too few nodes would be left.

    The nodes are written to a file in `folder`. The batch shell passes them to SLURM after it has requeued the job: SLURM
    rejects the change before that.

    Args:
        requeued: whether SLURM itself has requeued the job. Then SLURM is told at once.
    """
    file = folder / f"exclude-{place.job}"
    try:
        # The new list replaces the job's, so it must repeat the nodes that the user excludes.
        excluded = {*nodes, *slurm.excluded(place.job), *(file.read_text().split(",") if file.exists() else [])}
        # SLURM refuses this test if the nodes that are left could never run the job.
        slurm.call("sbatch", "--test-only", f"--exclude={','.join(sorted(excluded))}", str(folder / "job.sh"))
        file.write_text(",".join(sorted(excluded)))
        if requeued:
            slurm.exclude(place.job, sorted(excluded))
    except (OSError, UserError) as error:
        print(f"warning: {', '.join(nodes)} could not be excluded: {error}", file=sys.stderr)
