"""The weights that a run starts from: which they are, and how they stay until it needs them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.records.checkpoints import choose
from launch.records.read import find_run
from launch.records.run import read_run
from trainers.checkpoints import manifest
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

if TYPE_CHECKING:
    from launch.plan.spec import Spec

HINT = "give a run (RUN, RUN@best, RUN@STEP), a checkpoint's folder, or safetensors (a file or a folder)"


@dataclass(frozen=True)
class Weights:
    path: str                # absolute
    run: str | None = None   # whose checkpoint it is
    step: int | None = None  # of a checkpoint
    warnings: tuple[str, ...] = ()  # of others that were passed over

    def __str__(self) -> str:
        return f"run {self.run}, step {self.step}" if self.run else self.path


def resolved(spec: Spec, root: Path) -> Spec:
    """The spec with what `init.source` means now: a path.

    Raises:
        UserError: it means nothing.
    """
    from dataclasses import replace

    from launch.plan.spec import with_values

    init = getattr(spec.config, "init", None)
    if init is None or init.source is None or spec.weights is not None:
        return spec
    weights = find_weights(init.source, root)
    changed = with_values(spec, {"init": {**spec.values["init"], "source": weights.path}})
    return replace(changed, weights=weights)


def find_weights(word: str, root: Path) -> Weights:
    """What `init.source` means: a run under `root` (its newest whole checkpoint), a run `@best`, `@newest` or `@STEP`, or
    a path.

    Raises:
        UserError: there is no such thing.
    """
    path = Path(word).expanduser()
    an_id = os.sep not in word and (root / word).is_dir()
    if path.exists() and not an_id and not RunPaths(path).record.exists():
        return _at(path.absolute())
    name, at, which = word.rpartition("@")
    if not at or path.exists():
        name, which = word, None
    if os.sep in name and not Path(name).expanduser().exists():
        raise UserError(f"there is no `{name}` whose weights could be taken (`init.source`)", HINT)
    run = find_run(root, str(Path(name).expanduser()) if os.sep in name else name)
    return weights_of(run.paths, which)


def weights_of(paths: RunPaths, which: str | None) -> Weights:
    """A checkpoint of a run: see `choose`. Raises: UserError."""
    from launch.plan.spec import spec_of

    if not hasattr(spec_of(paths).config, "checkpoint"):
        raise UserError(f"run {paths.id} has no checkpoints: what a script or a search saves is its own",
                        "a file of safetensors can be given by its path")
    choice = choose(paths, which)
    return Weights(str(paths.checkpoint(choice.step).absolute()), paths.id, choice.step, tuple(choice.warnings()))


def warn(specs: Iterable[Spec]) -> None:
    """Say of each broken checkpoint once that another was taken."""
    for line in dict.fromkeys(line for spec in specs if spec.weights for line in spec.weights.warnings):
        print(f"warning: {line}", file=sys.stderr)


def _at(path: Path) -> Weights:
    if path.is_file():
        if (path.parent / manifest.NAME).exists():
            raise UserError(f"`{path}` is a part of a checkpoint", f"give the folder: {path.parent}")
        if path.suffix != ".safetensors":
            raise UserError(f"`{path}` is no file of safetensors", f"pickled weights are not loaded; {HINT}")
        return Weights(str(path))
    if (path / manifest.NAME).exists():
        try:
            step = read_json(path / manifest.NAME)["step"]
            found = manifest.read(path, step)
        except (manifest.Broken, OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"the checkpoint `{path}` is broken: {problem}", HINT) from None
        run = path.parent.parent if path.parent == RunPaths(path.parent.parent).checkpoints else None
        return Weights(str(path), read_run(run).id if run and RunPaths(run).record.exists() else None, found["step"])
    if not list(path.glob("*.safetensors")):
        raise UserError(f"`{path}` holds no checkpoint and no *.safetensors (`init.source`)", HINT)
    return Weights(str(path))


def keep(weights: Weights, paths: RunPaths) -> None:
    """Keep a checkpoint in a run's folder until the run has one of its own, since the run that it is of may delete it: by
    hard links, else by a copy. Other files stay where they are.

    Raises:
        UserError: it has been deleted meanwhile. OSError: there is no room.
    """
    source = Path(weights.path)
    if weights.step is None:
        return
    target = paths.init / source.name
    target.mkdir(parents=True)
    try:
        for file in sorted(source.iterdir()):
            try:
                os.link(file, target / file.name)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one that has no such links
                shutil.copyfile(file, target / file.name)
        manifest.sealed(target, weights.step)  # all of it, and not of two that had this name one after the other
    except (FileNotFoundError, manifest.Broken):
        raise UserError(f"the checkpoint {source} has just been deleted", "take a newer one") from None
    except OSError:
        shutil.rmtree(paths.init, ignore_errors=True)
        raise
