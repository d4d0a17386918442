"""The weights that a run starts from: how `init.source` names them, and how a copy is kept until the run needs them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from launch.plan.spec import Spec, Weights, spec_of, with_values
from launch.records.checkpoints import choose
from launch.records.read import find_run
from launch.records.run import read_run
from trainers.checkpoints import manifest
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.home import expanded
from trainers.contract.paths import RunPaths

HINT = "give a run (RUN, RUN@best, RUN@STEP), a checkpoint folder, or a safetensors file or folder"


def with_weights(spec: Spec, root: Path, find: Callable[[str, Path, int], Weights] | None = None) -> Spec:
    """Return the spec with `init.source` replaced by the path that it names at present, and with the weights of that path.

    Args:
        find: used in place of `find_weights`.

    Raises:
        UserError: there are no such weights.
    """
    init = getattr(spec.config, "init", None)
    if init is None or init.source is None or spec.weights is not None:
        return spec
    weights = (find or find_weights)(init.source, root, init.average or 1)
    changed = with_values(spec, {"init": {**spec.values["init"], "source": weights.path}})
    return replace(changed, weights=weights)


def find_weights(word: str, root: Path, count: int = 1) -> Weights:
    """Find the weights that `init.source` names.

    Args:
        word: `RUN` (the newest whole checkpoint), `RUN@best`, `RUN@newest`, `RUN@STEP`, or a path.
        root: the folder that holds the runs.
        count: of how many checkpoints to take the mean (`init.average`).

    Raises:
        UserError: there are no such weights, or they cannot be used.
    """
    path = expanded(word)
    is_run_id = os.sep not in word and (root / word).is_dir()
    if path.exists() and not is_run_id and not RunPaths(path).record.exists():
        return _weights_at(path.absolute(), count)
    name = word
    which: str | None = None
    if "@" in word and not path.exists():
        name, _, which = word.rpartition("@")
    if os.sep in name and not expanded(name).exists():
        raise UserError(f"`{name}` does not exist, so its weights cannot be loaded (`init.source`)", HINT)
    run = find_run(root, str(expanded(name)) if os.sep in name else name)
    return weights_of(run.paths, which, count)


def weights_of(paths: RunPaths, which: str | None, count: int = 1) -> Weights:
    """Return the weights of a run's checkpoint, or the mean of several; the arguments are those of
    `launch.records.checkpoints.choose`. Reads the whole checkpoints.

    Raises:
        UserError: the run writes no checkpoints, or has no such checkpoint that is whole.
    """
    if not hasattr(spec_of(paths).config, "checkpoint"):
        raise UserError(f"run {paths.id} has no checkpoints: scripts and searches save their results themselves",
                        "give the path of a safetensors file instead")
    choice = choose(paths, which, count)
    return Weights(str(paths.checkpoint(choice.step).absolute()), paths.id, choice.step, tuple(choice.warnings()), choice.older)


def warn_of_broken(specs: Iterable[Spec]) -> None:
    """Print a warning for each broken checkpoint that was passed over, once even if several specs have it."""
    for line in dict.fromkeys(line for spec in specs if spec.weights for line in spec.weights.warnings):
        print(f"warning: {line}", file=sys.stderr)


def _weights_at(path: Path, count: int) -> Weights:
    if count > 1 and not (path / manifest.NAME).exists():
        raise UserError(f"`{path}` is no run's checkpoint, so there are no older ones to average it with",
                        "leave out init.average, or give a run: RUN, RUN@best, RUN@STEP")
    if path.is_file():
        if (path.parent / manifest.NAME).exists():
            raise UserError(f"`{path}` is a part of a checkpoint", f"give the folder: {path.parent}")
        if path.suffix != ".safetensors":
            raise UserError(f"`{path}` is not a safetensors file", f"pickled weights are not loaded; {HINT}")
        return Weights(str(path))
    if (path / manifest.NAME).exists():
        try:
            step = read_json(path / manifest.NAME)["step"]
            content = manifest.verify(path, step)
        except (manifest.Broken, OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"the checkpoint `{path}` is broken: {problem}", HINT) from None
        run = path.parent.parent if path.parent == RunPaths(path.parent.parent).checkpoints else None
        if count > 1 and run:
            return weights_of(RunPaths(run), str(step), count)
        if count > 1:
            raise UserError(f"`{path}` is one checkpoint, and not in the folder of its run: there is nothing to average it with",
                            "leave out init.average, or give a run")
        return Weights(str(path), read_run(run).id if run and RunPaths(run).record.exists() else None, content["step"])
    if not list(path.glob("*.safetensors")):
        raise UserError(f"`{path}` contains no checkpoint and no *.safetensors file (`init.source`)", HINT)
    return Weights(str(path))


def keep_checkpoint(weights: Weights, paths: RunPaths) -> None:
    """Keep checkpoints in the new run's `init/` folder, because the run that wrote the checkpoints may delete them.

    The files are hard links where possible, otherwise copies. Weights that are not a checkpoint stay where they are.

    Raises:
        UserError: the checkpoint was deleted in the meantime.
        OSError: the files cannot be written.
    """
    if weights.step is not None:
        for step in (weights.step, *weights.older):
            source = Path(weights.path)
            _keep(source if step == weights.step else source.with_name(f"step_{step}"), step, paths)


def _keep(source: Path, step: int, paths: RunPaths) -> None:
    target = paths.init / source.name
    target.mkdir(parents=True)
    try:
        for name in [*manifest.read(source, step)["files"], manifest.NAME]:
            try:
                os.link(source / name, target / name)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or a file system without hard links
                shutil.copyfile(source / name, target / name)
        # Meanwhile a new checkpoint may have replaced the old one under this name: check that the files belong together.
        manifest.verify_sizes(target, step)
    except (FileNotFoundError, manifest.Broken):
        raise UserError(f"the checkpoint {source} has just been deleted", "use a newer checkpoint") from None
    except OSError:
        shutil.rmtree(paths.init, ignore_errors=True)
        raise
