"""Packages that import a name when it is first asked for, so that `moram --help` needs no torch."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def attach(package: str, homes: Mapping[str, Iterable[str]]) -> None:
    """Let a package import names, and its own modules, when they are first asked for.

    After that, everything is as if its `__init__` had imported them.

    Args:
        package: `__name__` of the package, whose `__init__` calls this.
        homes: by module of the package, the public names that it defines.
    """
    module = sys.modules[package]
    by_name = {name: home for home, names in homes.items() for name in names}
    vars(module)["_homes"] = by_name
    module.__class__ = LazyPackage


class LazyPackage(ModuleType):
    """A package after `attach`.

    A class, and not the function `__getattr__` of a module: that one hides from type checkers which
    names there are, and cannot keep `moram.task` the function once the module `moram.task` is
    imported.
    """

    _homes: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name in self._homes:
            value = getattr(import_module(f"{self.__name__}.{self._homes[name]}"), name)
            super().__setattr__(name, value)
            return value
        missing = f"module {self.__name__!r} has no attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(missing)
        path = f"{self.__name__}.{name}"
        try:
            return import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise AttributeError(missing) from None

    def __setattr__(self, name: str, value: object) -> None:
        # What importing the module `task` does; the name is the function's.
        if not (name in self._homes and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        # What pickles modules by their names knows the class `ModuleType` alone.
        return import_module, (self.__name__,)
