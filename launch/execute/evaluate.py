"""Evaluate a checkpoint of a run, without training: a run of its own, in `evals/` of that one's folder."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch.cluster.config import load_cluster
from launch.cluster.resources import Wanted, local_resources
from launch.execute import record
from launch.execute.local import as_before, on, plan_here, run_attempts
from launch.plan.initial_weights import warn, weights_of
from launch.plan.job_script import Request
from launch.plan.spec import Spec, spec_of, with_overrides, with_values
from launch.records.naming import new_run_id, shown
from launch.records.run import Run
from launch.supervise.terminal import make_view
from trainers.config.micro_batch import tried
from trainers.contract.errors import UserError
from trainers.contract.files import read_json

# What an override may change: by which the weights mean the same. A section, or a key.
ALLOWED = ("data", "eval", "run", "train.precision", "train.strategy", "train.offload", "train.deterministic")
# By section, why another may not.
REFUSED = {
    "model": "the weights are those of the model as it was trained",
    "init": "the weights are the run's own: --step chooses among its checkpoints",
    "train": "nothing is trained",
    "optim": "nothing is trained",
    "checkpoint": "nothing is saved",
    "log": "no step is logged",
    "wandb": "an evaluation goes into its own folder alone",
}


def evaluate(run: Run, *, which: str | None, overrides: Sequence[str], wanted: Wanted, json: bool) -> int:
    """Evaluate on this machine, on as many ranks as the run had here last unless told. Returns the exit code.

    Raises:
        UserError: something the user must mend; nothing was written.
    """
    spec = evaluation_spec(run, which, overrides)
    warn([spec])
    here = (run.record["job"] or {}).get("kind") == "local"
    resources, cwd = as_before(run.paths, spec, wanted) if here else (local_resources(wanted), Path.cwd())
    spec.config.check()
    plan_of = partial(plan_here, new_run_id(spec.name), spec, load_cluster("local"), resources, run.paths.evaluations.absolute(),
                      cwd)
    plan = plan_of(1)
    # --json prints one object: what goes on is said on standard error.
    view = make_view(json=False, stream=sys.stderr if json else None)
    paths = record.create_run(plan)
    view.notice(f"evaluating {spec.weights} in {shown(paths.root)}: {on(resources)}")
    code = run_attempts(plan_of, paths, 1, view, plan.max_restarts, debug=False)
    if json and code == 0:
        print(jsonlib.dumps({"id": paths.id, "run": run.id, "step": spec.weights.step, "overrides": list(overrides),
                             "device": resources.device, "ranks": resources.ranks,
                             "metrics": read_json(paths.record)["metrics"], "path": str(paths.root)}, ensure_ascii=False))
    return code


def submit(run: Run, *, which: str | None, overrides: Sequence[str], request: Request, wanted: Wanted,
           json: bool, show_log: Callable[[Run], None] | None) -> int:
    """Evaluate on SLURM. Returns the exit code. Raises: UserError."""
    from launch.execute import on_slurm

    return on_slurm.start(spec=evaluation_spec(run, which, overrides), root=run.paths.evaluations.absolute(), request=request,
                          wanted=wanted, dry_run=False, json=json, show_log=show_log, here=False)


def evaluation_spec(run: Run, which: str | None, overrides: Sequence[str]) -> Spec:
    """The run's spec, changed to an evaluation of a checkpoint.

    Raises:
        UserError: it has none such; an override would change what is evaluated.
    """
    weights = weights_of(run.paths, which)
    for word in overrides:
        key = word.partition("=")[0]
        section = key.partition(".")[0]
        if key not in ALLOWED and section not in ALLOWED:
            raise UserError(f"`{key}` cannot be given to an evaluation: {REFUSED.get(section, 'it is of the run')}",
                            "it takes data.*, eval.*, train.precision and train.strategy")
    spec = with_overrides(spec_of(run.paths), overrides)
    values = spec.values
    given = {word.partition("=")[0] for word in overrides}
    offload = values["train"]["offload"]
    if "train.offload" not in given and ("train.strategy" in given or offload == "optimizer"):
        offload = "none"
    # What is of training alone, and might not go with another strategy.
    train = {**values["train"], "deepspeed": {}, "compile": False, "offload": offload}
    if train["micro_batch_size"] == "auto" and (sizes := tried(run.paths)):
        train["micro_batch_size"] = sizes[-1]["next"]  # which was found to fit: evaluation goes by it
    return replace(with_values(spec, {
        "init": {"source": weights.path}, "eval": {**values["eval"], "only": True}, "train": train,
        "checkpoint": {**values["checkpoint"], "layout": "sharded"}, "wandb": {**values["wandb"], "mode": "off"},
    }), weights=weights)
