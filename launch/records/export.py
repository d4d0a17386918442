"""Export the models of a checkpoint to files that other programs read. Starts no ranks and needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from launch.records.checkpoints import choose
from launch.records.run import Run
from trainers.checkpoints import export as engine
from trainers.checkpoints import facts
from trainers.checkpoints.averaging import mean_of
from trainers.contract.errors import UserError
from trainers.contract.text import size

SUFFIX = ".safetensors"


def export(run: Run, *, which: str | None, to: str, output: Path | None, raw: bool = False,
           average: int = 1) -> dict[str, Any]:
    """Write the models of one checkpoint to files, without optimizer states and other data.

    Args:
        which: a step, `best`, or None for the newest whole checkpoint.
        to: `safetensors` for one file per model, or `huggingface` for one folder per model.
        output: a folder; by default the run's `export/step_<n>/`, or beside it `step_<n>-raw/` or `step_<n>-average-<k>/`.
            With `safetensors` and a single model it may also be the file itself, if its name ends in .safetensors. With
            `huggingface` and a single model it is the model's folder.
        raw: write the trained weights, even if the checkpoint has averages of them (`train.ema`).
        average: write the mean of the trained weights of so many checkpoints: this one and those before it.

    Returns:
        `step`, `weights` (what they are, in words), `warnings` (about checkpoints that were passed over), `files` (the path of
        each model's file or folder, by the model's name), `bytes` and `facts` (what the task keeps with the weights; the
        files' metadata holds them too).

    Raises:
        UserError: there is no such checkpoint, it is broken, a model has no such layout, or the output cannot be written.
    """
    choice = choose(run.paths, which, average)
    step = choice.step
    checkpoint, *older = [run.paths.checkpoint(each) for each in (step, *choice.older)]
    try:
        models = engine.read_models(checkpoint, raw, older)
        places = _outputs(run, step, to, output, _default_folder(run, step, raw, average), list(models))
        known = facts.read(checkpoint)
        about = facts.metadata(known, run.id, step)
        if to == "huggingface":
            for name in models:
                _require_layout(run, name)
        written = 0
        for name, model in models.items():
            if to == "huggingface":
                written += engine.to_huggingface(model, run.paths.huggingface(name), places[name], about)
            else:
                written += engine.to_safetensors(model, places[name], about)
    except Exception:
        if gone := [folder for folder in (checkpoint, *older) if not folder.exists()]:
            raise UserError(f"the run deleted the checkpoint {gone[0].name} during the export",
                            "try again: the run has a newer checkpoint") from None
        raise
    files = {name: str(path) for name, path in places.items()}
    weights = "averaged weights (train.ema)" if any(model.averaged for model in models.values()) else "trained weights"
    if choice.older:
        weights = mean_of(step, choice.older)
    return {"step": step, "weights": weights, "warnings": choice.warnings(), "files": files, "bytes": written, "facts": known}


def say(exported: dict[str, Any]) -> None:
    """Print what `export` did: the paths to standard output, everything else to standard error."""
    for line in exported["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(f"step {exported['step']}, {exported['weights']}, {size(exported['bytes'])}", file=sys.stderr)
    for key, words in facts.names(exported["facts"]).items():
        more = f", ... ({len(words):,} in all)" if len(words) > 20 else ""
        print(f"{key}, in order: {', '.join(words[:20])}{more}", file=sys.stderr)
    for path in exported["files"].values():
        print(path)


def _default_folder(run: Run, step: int, raw: bool, average: int) -> Path:
    """Return the folder for these weights. Other weights of the same step have another."""
    folder = run.paths.export(step)
    return folder.with_name(folder.name + (f"-average-{average}" if average > 1 else "-raw" if raw else ""))


def _outputs(run: Run, step: int, to: str, output: Path | None, default: Path, names: list[str]) -> dict[str, Path]:
    """Return the file or folder that each model is written to.

    Raises:
        UserError: the checkpoint has no model, or `output` is one file and there are several models.
    """
    if not names:
        raise UserError(f"the checkpoint of step {step} contains no model")
    folder = output.absolute() if output else default
    if to == "huggingface":
        folder = folder if output else folder / "huggingface"
        return {name: folder if len(names) == 1 else folder / name for name in names}
    if folder.suffix == SUFFIX:
        if len(names) > 1:
            raise UserError(f"`{run.id}` has {len(names)} models ({', '.join(names)}), but `{output}` is one file",
                            "give a folder: -o FOLDER")
        return {names[0]: folder}
    return {name: folder / f"{name}{SUFFIX}" for name in names}


def _require_layout(run: Run, name: str) -> None:
    """Raise an error if the run has no files for the model in Hugging Face's layout.

    Raises:
        UserError: there is no config.json for the model.
    """
    if not (run.paths.huggingface(name) / engine.CONFIG).is_file():
        raise UserError(f"model `{name}` of `{run.id}` has no Hugging Face layout: it is not a model of transformers, and task "
                        f"`{run.record['task']}` writes no {engine.CONFIG} for it",
                        "use --to safetensors; your own task can write that file in Task.huggingface(model, folder)")
