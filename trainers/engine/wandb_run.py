"""The run in Weights & Biases: its id is the run's id, so that every attempt continues the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

from trainers.config import RunConfig
from trainers.paths import RunPaths

ONLINE_WITHIN_S = 30


class WandbRun:
    """A W&B run, online or offline, whose own step is ours."""

    def __init__(self, config: RunConfig, paths: RunPaths, logged: int, note: Callable[[str, str], None]):
        """`logged`: the last step that earlier attempts have logged; it and those before are not logged again.
        `note(level, message)` tells the user why a run that was to be online is offline."""
        import wandb

        common: dict[str, Any] = dict(
            id=paths.id, name=paths.id, project=config.wandb.project, entity=config.wandb.entity, resume="allow",
            dir=str(paths.root), config=config.model_dump(mode="json"), job_type=config.name,
        )
        settings = wandb.Settings(console="off", silent=True, init_timeout=ONLINE_WITHIN_S)
        offline = "not asked for"
        if config.wandb.mode == "online":
            try:
                offline = "" if wandb.login(prompt=False) else "no API key: set WANDB_API_KEY or use `wandb login`"
                if not offline:
                    self._run = wandb.init(mode="online", settings=settings, **common)
            except wandb.errors.Error as error:
                offline = str(error).splitlines()[0]
            if offline:
                note("warning", f"W&B is not online ({offline}); this run is tracked offline: upload it later with "
                                f"`launch sync {paths.id}`")
        if offline:
            self._run = wandb.init(mode="offline", settings=settings, **common)
        self._wandb = wandb
        # W&B appends: a step of its history cannot be taken back, and `wandb sync` moves a repeated one up.
        self._logged = logged
        if self._run.url:
            note("info", f"W&B: {self._run.url}")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self._logged:
            self._run.log(dict(values), step=step)

    def figures(self, step: int, folder: Path) -> None:
        pictures = {f"figures/{p.stem}": self._wandb.Image(str(p)) for p in sorted(folder.glob("*.png"))}
        if pictures:
            self._run.log(pictures, step=step)

    def finish(self, finished: bool) -> None:
        """`finished` False: stopped, to be resumed."""
        if not finished:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if finished else 75)
