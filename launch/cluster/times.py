"""Time limits as SLURM writes them."""

from __future__ import annotations

import re


def seconds(text: str) -> int:
    """Return the seconds of a time limit.

    The text may have any form that SLURM accepts (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS), or a unit: `90s`,
    `90m`, `4h`, `2d`.

    Raises:
        ValueError: the text is not a time, or the time is zero.
    """
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        total = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    elif re.fullmatch(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})", text):
        days, dash, clock = text.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
        total = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))
    else:
        total = 0
    if not total:
        raise ValueError("must be a time such as 30 (minutes), 4h, 12:00:00 or 1-00:00:00")
    return total


def slurm_time(total_s: int) -> str:
    """Return a time limit as SLURM writes it: D-HH:MM:SS."""
    days, rest = divmod(total_s, 86400)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
