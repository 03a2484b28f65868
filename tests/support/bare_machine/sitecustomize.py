"""Hide the packages that a bare GPU machine lacks, as if not installed.

Python imports a module of this name at its start, so they are missing wherever PYTHONPATH has this folder.
"""

import sys
from importlib.machinery import PathFinder

HIDDEN = ("datasets", "datatrove", "dill", "evaluate", "loguru", "multiprocess")


class BareMachineFinder(PathFinder):
    """Finds what the usual finder of `sys.path` does, except the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path = [BareMachineFinder if finder is PathFinder else finder for finder in sys.meta_path]
