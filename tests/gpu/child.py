"""Run one check in this process: `python child.py FUNCTION ANSWERS FOLDER (cuda | cpu)`. The driver starts this program."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]  # in place of this folder

from gpu.place import Place


def main(function: str, answers: str, folder: str, device: str) -> int:
    module, _, name = function.partition(":")
    place = Place(device == "cpu", Path(folder), Path(answers))
    try:
        getattr(import_module(module), name)(place)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        place.expect(False, f"{type(error).__name__}: {text[:500]}")
        return 1
    place.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
