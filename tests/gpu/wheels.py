"""Fetch the wheels that a machine without internet lacks, for Python 3.12 on x86-64.

    python tests/gpu/wheels.py FOLDER [--lacks NAME ...]

Run this where the project is installed: each wheel has the version that is installed here. The default names are what a machine
lacks that has torch, transformers, accelerate and scikit-learn. On that machine:

    python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
    PYTHONPATH=SITE python3 tests/gpu/drive.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

LACKS = ("deepspeed", "hjson", "py-cpuinfo", "msgpack", "einops", "ninja", "pydantic", "pydantic-core", "annotated-types",
         "typing-inspection", "typing-extensions", "ruamel.yaml", "submitit", "cloudpickle")
ONLY_SOURCE = ("deepspeed",)  # PyPI has no wheel; without compiled operations the wheel fits any Python
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + [f"manylinux{year}_x86_64" for year in (2014, 2010)]


def fetch(name: str, folder: Path) -> None:
    """Put the wheel of a library into the folder, in the version that is installed here."""
    wanted = f"{name}=={version(name)}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if name in ONLY_SOURCE:  # its setup imports torch, so it is built with the libraries that are installed here
        command = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), wanted]
    else:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation",
                   "cp", *platforms, "-d", str(folder), wanted]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lacks", nargs="+", default=LACKS, metavar="NAME", help=f"default: {' '.join(LACKS)}")
    args = parser.parse_args()
    for name in args.lacks:
        fetch(name, args.folder)
    wheels = sorted(args.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB, in {args.folder}")


if __name__ == "__main__":
    main()
