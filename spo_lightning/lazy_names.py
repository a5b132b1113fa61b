"""Names of a package that load on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a package, which raises AttributeError on a name that it does not have.

    Args:
        package: its ``__name__``.
        modules: name to the module within the package that it comes from.
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(modules)}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return load
