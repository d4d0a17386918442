"""Evaluate a checkpoint of a run without training. The evaluation is its own run, in `evals/` of the run's folder."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources, Wanted, local_resources
from launch.execute import record
from launch.execute.local import as_before, plan_here, ranks_text, run_attempts
from launch.plan.initial_weights import warn_of_broken, weights_of
from launch.plan.job_script import Request
from launch.plan.spec import Spec, spec_of, with_overrides, with_values
from launch.records.naming import new_run_id, short_path
from launch.records.run import Run
from launch.supervise.terminal import make_view
from trainers.config.micro_batch import tried_sizes
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.text import either

# Sections and keys that may be overridden in an evaluation: they do not change what the weights mean.
ALLOWED = ("data", "eval", "run", "train.precision", "train.strategy", "train.offload", "train.deterministic")
# Why the other sections may not be overridden.
REFUSED = {
    "model": "the weights belong to the model as it was trained",
    "init": "the weights are the run's own: --step chooses among its checkpoints",
    "train": "nothing is trained",
    "optim": "nothing is trained",
    "checkpoint": "nothing is saved",
    "log": "no step is logged",
    "wandb": "an evaluation is recorded only in its own folder",
}


def evaluate(run: Run, *, which: str | None, init: Mapping[str, Any], overrides: Sequence[str], wanted: Wanted,
             json: bool) -> int:
    """Evaluate on this machine. Returns the exit code.

    Args:
        which: the checkpoint, as `weights_of` takes it.
        init: keys of `init` that say which weights of the checkpoint are evaluated.
        wanted: if it is empty and the run was last on this machine, the evaluation has as many ranks as the run had.
        json: print the result as one JSON object.

    Raises:
        UserError: the user must fix something; nothing was written.
    """
    spec = evaluation_spec(run, which, overrides, init)
    warn_of_broken([spec])
    assert isinstance(spec.config, RunConfig) and spec.weights  # only a run with steps has checkpoints
    resources, cwd = resources_like(run, spec, wanted)
    spec.config.check()
    plan_of = partial(plan_here, new_run_id(spec.name), spec, load_cluster("local"), resources,
                      run.paths.evaluations.absolute(), cwd)
    plan = plan_of(1)
    # With --json, standard output is for the result: progress goes to standard error.
    view = make_view(json=False, stream=sys.stderr if json else None)
    paths = record.create_run(plan)
    view.notice(f"evaluating {spec.weights} in {short_path(paths.root)}: {ranks_text(resources)}")
    code = run_attempts(plan_of, paths, 1, view, plan.max_restarts, debug=False)
    if json and code == 0:
        print(jsonlib.dumps({"id": paths.id, "run": run.id, "step": spec.weights.step, **init, "overrides": list(overrides),
                             "device": resources.device, "ranks": resources.ranks,
                             "metrics": read_json(paths.record)["metrics"], "path": str(paths.root)}, ensure_ascii=False))
    return code


def submit(run: Run, *, which: str | None, init: Mapping[str, Any], overrides: Sequence[str], request: Request,
           wanted: Wanted, json: bool, show_log: Callable[[Run], None] | None) -> int:
    """Submit the evaluation to SLURM. Returns the exit code. Raises: UserError."""
    from launch.execute import on_slurm

    return on_slurm.start(spec=evaluation_spec(run, which, overrides, init), root=run.paths.evaluations.absolute(),
                          request=request, wanted=wanted, dry_run=False, json=json, show_log=show_log, here=False)


def resources_like(run: Run, spec: Spec, wanted: Wanted) -> tuple[Resources, Path]:
    """The resources and the working folder of the run, if it was last on this machine; otherwise what this machine has."""
    was_local = (run.record["job"] or {}).get("kind") == "local"
    return as_before(run.paths, spec, wanted) if was_local else (local_resources(wanted), Path.cwd())


def evaluation_spec(run: Run, which: str | None, overrides: Sequence[str], init: Mapping[str, Any] = {}) -> Spec:
    """The spec that evaluates a checkpoint of the run.

    Raises:
        UserError: the run has no such checkpoint, or an override would change what is evaluated.
    """
    weights = weights_of(run.paths, which, init.get("average") or 1)
    for word in overrides:
        key = word.partition("=")[0]
        section = key.partition(".")[0]
        if key not in ALLOWED and section not in ALLOWED:
            raise UserError(f"`{key}` cannot be overridden in an evaluation: {REFUSED.get(section, 'it belongs to the run')}",
                            f"override {either(word if '.' in word else f'{word}.*' for word in ALLOWED)}")
    spec = with_overrides(spec_of(run.paths), overrides)
    values = spec.values
    given = {word.partition("=")[0] for word in overrides}
    offload = values["train"]["offload"]
    if "train.offload" not in given and ("train.strategy" in given or offload == "optimizer"):
        offload = "none"
    # These settings matter only in training, and another strategy may not support them.
    train = {**values["train"], "deepspeed": {}, "compile": False, "offload": offload}
    if train["micro_batch_size"] == "auto" and (sizes := tried_sizes(run.paths)):
        train["micro_batch_size"] = sizes[-1]["next"]  # the size that training found to fit
    return replace(with_values(spec, {
        "init": {**init, "source": weights.path}, "eval": {**values["eval"], "only": True}, "train": train,
        "checkpoint": {**values["checkpoint"], "layout": "sharded"}, "wandb": {**values["wandb"], "mode": "off"},
    }), weights=weights)
