"""A Python that lacks packages which are installed here, in its own process and in those that it starts.

subprocess.run(command, env=blocked.environment(tmp_path, "diffusers"))
"""

from __future__ import annotations

import os
from pathlib import Path

_SITE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def environment(folder: Path, *names: str) -> dict[str, str]:
    """The environment of such a process. folder: where what it runs first is written to."""
    (folder / "sitecustomize.py").write_text(_SITE.format(names=set(names)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
