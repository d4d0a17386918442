"""A cluster as its YAML file describes it: the user's own, or one of cluster_configs/."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from trainers import yaml12
from trainers.config import Section
from trainers.errors import UserError
from trainers.spec import mapping, read_text, validate

BUILT_IN = Path(__file__).parents[1] / "cluster_configs"


class ClusterConfig(Section):
    """Where runs go."""

    name: str = Field(description="by default the file's")
    description: str = ""
    defaults: dict[str, Any] = Field(default_factory=dict, description="keys of a spec, over those of a task's file")
    env: dict[str, str] = Field(default_factory=dict, description="variables that ranks get")


def folders(environment: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
    """Where cluster files lie: the user's folder, which comes first, and ours."""
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "launch" / "clusters", BUILT_IN


def load_cluster(name: str) -> ClusterConfig:
    """Raises: UserError if there is no such cluster, or its file is wrong."""
    known = {path.stem: path for folder in reversed(folders()) for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise UserError(f"there is no cluster `{name}`",
                        f"there is {', '.join(sorted(known))}; your own go to {folders()[0]}/NAME.yaml")
    path = known[name]
    document = yaml12.read(read_text(path), path.name)
    values = {"name": name, **mapping(document.value, path.name)}
    return validate(ClusterConfig, values,
                    lambda key: f"{path}:{document.lines[key]}" if key in document.lines else None)
