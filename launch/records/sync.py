"""Uploads what a run has logged to Weights & Biases offline."""

from __future__ import annotations

import netrc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch.records.run import Run
from launch.records.state import ACTIVE, state_of
from trainers.contract.errors import UserError


def sync(run: Run, say: Callable[[str], Any] = print) -> int:
    """Upload the run's offline W&B folders, one an attempt, as the one W&B run whose id is the run's.

    wandb (0.31) takes several folders of one id in the order in which they began and continues the run with
    each, if they were written with `resume="allow"`. A folder it has done gets a marker and is passed over
    from then on. wandb's own output goes to the terminal.

    Returns:
        0 if wandb has marked every folder as done, else its exit code, or 1: it ends with 0 even where the
        server has refused everything.

    Raises:
        UserError: the run is at work, there is nothing to upload, or there is no API key.
    """
    if (state := state_of(run)) in ACTIVE:
        raise UserError(f"run `{run.id}` is {state}: its W&B folder is not complete",
                        f"wait for its end, or `launch cancel {run.id}`")
    folders = sorted((run.paths.root / "wandb").glob("offline-run-*"))
    if not folders:
        raise UserError(f"run `{run.id}` has no offline W&B folder in `{run.paths.root / 'wandb'}`",
                        "runs with wandb.mode=offline write one; those with `online` have uploaded already")
    waiting = [folder for folder in folders if not _synced(folder)]
    for folder in folders:
        if folder not in waiting:
            say(f"already synced: {folder.name}")
    if not waiting:
        return 0
    if not has_key():
        raise UserError(f"there is no W&B API key for {server(os.environ)}",
                        "set WANDB_API_KEY, or type `wandb login`")
    command = [sys.executable, "-m", "wandb", "sync", "--id", run.record["id"], *map(str, waiting)]
    # No standard input: wandb would wait there for a key that it does not like.
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    return code or int(not all(map(_synced, waiting)))


def has_key(env: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb will find credentials for its server: in the environment, or in the netrc file."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]
    host = urlsplit(server(env)).netloc
    for file in (Path(name).expanduser() for name in names):
        try:
            found = netrc.netrc(file).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return True
    return False


def server(env: Mapping[str, str]) -> str:
    """The address of the W&B server: WANDB_BASE_URL, what `wandb login --host` has noted, or the public one."""
    settings = ConfigParser(interpolation=None)
    try:
        settings.read(Path(env.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    except (ConfigError, OSError, UnicodeDecodeError):
        pass
    return env.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="https://api.wandb.ai")


def _synced(folder: Path) -> bool:
    """Whether wandb has marked the folder's log as uploaded: `run-<id>.wandb.synced` beside it."""
    return any(folder.glob("*.wandb.synced"))
