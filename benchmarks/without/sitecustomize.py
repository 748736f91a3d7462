"""Python as on a machine that lacks some packages: with this folder on PYTHONPATH, those named by FASTLDM_WITHOUT, with
commas between, are nowhere to be found. For rehearsals and tests."""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset(filter(None, os.environ.get("FASTLDM_WITHOUT", "").split(",")))


class Without(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else PathFinder.find_spec(fullname, path, target)


if HIDDEN:
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
