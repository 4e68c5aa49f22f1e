"""`gradproof.check`: the function, and the module from which scripts that are older than it import it."""

import sys
from types import ModuleType
from typing import Any

from gradproof.run.check import check, replay
from gradproof.run.results import Report

__all__ = ["Report", "check", "replay"]


class _CallableModule(ModuleType):
    """Python makes an imported submodule an attribute of its package, in place of the function of that name."""

    def __call__(self, *args: Any, **options: Any) -> Report:
        return check(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
