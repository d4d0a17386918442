"""The models of a run's checkpoint as files for others, here and at once: without ranks, and without torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from launch.records.checkpoints import choose
from launch.records.run import Run
from trainers.checkpoints import export as engine
from trainers.checkpoints import manifest
from trainers.contract.errors import UserError
from trainers.contract.text import size

SUFFIX = ".safetensors"


def export(run: Run, *, which: str | None, to: str, output: Path | None) -> dict[str, Any]:
    """Write the models of one checkpoint, without what else it holds: `step`, `warnings` (of those that were
    passed over), `files` (the path of each model's file or folder, by the model's name), `bytes`.

    Args:
        which: a step, `best`, or None: the newest whole one.
        to: `safetensors`, a file a model, or `huggingface`, a folder a model.
        output: by default in the run's `export/step_<n>/`. A folder; of a single model the very file, if its name ends so,
            or the very folder in Hugging Face's layout.
    Raises:
        UserError: there is no such checkpoint, it is broken, a model has no such layout, or the output cannot be written.
    """
    choice = choose(run.paths, which, manifest.verify)
    step = choice.step
    checkpoint = run.paths.checkpoint(step)
    try:
        models = engine.read_models(checkpoint)
        places = _places(run, step, to, output, list(models))
        about = {"run": run.id, "step": str(step)}
        if to == "huggingface":
            for name in models:
                _described(run, name)
        written = 0
        for name, model in models.items():
            if to == "huggingface":
                written += engine.to_huggingface(model, run.paths.huggingface(name), places[name], about)
            else:
                written += engine.to_safetensors(model, places[name], about)
    except Exception:
        if not checkpoint.exists():
            raise UserError(f"the checkpoint of step {step} was deleted meanwhile", "the run has newer ones: once more") from None
        raise
    files = {name: str(path) for name, path in places.items()}
    return {"step": step, "warnings": choice.warnings(), "files": files, "bytes": written}


def say(found: dict[str, Any]) -> None:
    """What `export` did, for a person: the paths to standard output."""
    for line in found["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(f"step {found['step']}, {size(found['bytes'])}", file=sys.stderr)
    for path in found["files"].values():
        print(path)


def _places(run: Run, step: int, to: str, output: Path | None, names: list[str]) -> dict[str, Path]:
    """Where each model goes."""
    if not names:
        raise UserError(f"the checkpoint of step {step} holds no model")
    folder = output.absolute() if output else run.paths.export(step)
    if to == "huggingface":
        folder = folder if output else folder / "huggingface"
        return {name: folder if len(names) == 1 else folder / name for name in names}
    if folder.suffix == SUFFIX:
        if len(names) > 1:
            raise UserError(f"`{run.id}` has {len(names)} models ({', '.join(names)}), and `{output}` is one file",
                            "-o names a folder for them")
        return {names[0]: folder}
    return {name: folder / f"{name}{SUFFIX}" for name in names}


def _described(run: Run, name: str) -> None:
    if not (run.paths.huggingface(name) / engine.CONFIG).is_file():
        raise UserError(f"model `{name}` of `{run.id}` has no Hugging Face layout: it is no model of transformers, and task "
                        f"`{run.record['task']}` gives it no {engine.CONFIG}",
                        "--to safetensors; a task of your own gives one by Task.huggingface(model, folder)")
