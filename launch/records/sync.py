"""Upload a run's offline Weights & Biases data."""

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

from launch.records.naming import command_name
from launch.records.run import Run
from launch.records.state import ACTIVE, state_of
from trainers.contract.errors import UserError


def sync(run: Run, say: Callable[[str], Any] = print) -> int:
    """Upload the run's offline W&B folders, one per attempt, as a single W&B run with the run's id.

    wandb (0.31) accepts several folders with one id: it takes them in the order in which they were started and continues
    the W&B run with each, if they were written with `resume="allow"`. wandb marks each folder that it has uploaded;
    marked folders are skipped. wandb's own output goes to the terminal.

    Args:
        say: prints one line for each folder that is skipped.

    Returns:
        wandb's exit code; but 1 if that code is 0 and wandb has not marked every folder as uploaded. wandb exits with 0 even
        if the server has refused everything.

    Raises:
        UserError: the run is running or waiting, there is nothing to upload, or there is no API key.
    """
    if (state := state_of(run)) in ACTIVE:
        raise UserError(f"run `{run.id}` is {state}: its W&B folder is not complete",
                        f"wait until it has ended, or type `launch cancel {command_name(run.paths)}`")
    folders = sorted((run.paths.root / "wandb").glob("offline-run-*"))
    if not folders:
        raise UserError(f"run `{run.id}` has no offline W&B folder in `{run.paths.root / 'wandb'}`",
                        "only runs with wandb.mode=offline have one; runs with wandb.mode=online have uploaded already")
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
    # No standard input: if wandb does not accept the key, it would ask there for another key, and wait for an answer.
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    return code or int(not all(map(_synced, waiting)))


def has_key(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether wandb will find credentials for its server, in the environment or in the netrc file."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]
    host = urlsplit(server(env)).netloc
    for name in names:
        try:
            credentials = netrc.netrc(os.path.expanduser(name)).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if credentials and credentials[2]:  # (login, account, password)
            return True
    return False


def server(env: Mapping[str, str]) -> str:
    """Return the URL of the W&B server: WANDB_BASE_URL, the one that `wandb login --host` has saved, or the public one."""
    settings = ConfigParser(interpolation=None)
    try:
        settings.read(Path(os.path.expanduser(env.get("WANDB_CONFIG_DIR", "~/.config/wandb")), "settings"))
    except (ConfigError, OSError, UnicodeDecodeError):
        pass
    url: str = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    return env.get("WANDB_BASE_URL") or url


def _synced(folder: Path) -> bool:
    """Return whether wandb has marked the folder as uploaded, with a file `run-<id>.wandb.synced` in it."""
    return any(folder.glob("*.wandb.synced"))
