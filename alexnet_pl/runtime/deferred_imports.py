"""Deferred imports: modules that torch, Lightning and torchmetrics import but a run seldom needs load on first use.

Lightning, torchvision and every optimizer import ``torch._dynamo``, and with it inductor and sympy. Lightning imports
all of torchmetrics, which imports ``scipy.signal`` and pyplot. Together these take longer than torch itself. A deferred
module answers the names that its importers copy, and loads in place when another one is asked for: nothing changes but
the time. tests/runtime/test_deferred_imports.py names every use.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_lock = threading.RLock()


def defer_imports() -> None:
    """Defer the modules in :data:`DEFERRED` from now on. Do nothing in a process that has loaded torch already."""
    if "torch" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_deferred(module: ModuleType | None) -> bool:
    """Return True if the module has not been loaded yet."""
    return module is not None and isinstance(getattr(module.__spec__, "loader", None), _DeferredLoader)


def load(module: ModuleType) -> None:
    """Run a deferred module, after its package. Do nothing if it has been loaded."""
    with _lock:
        parent = sys.modules.get(module.__name__.rpartition(".")[0])
        if parent is not None and is_deferred(parent):
            load(parent)
        loader = getattr(module.__spec__, "loader", None)
        if isinstance(loader, _DeferredLoader):
            loader.load(module)


class _DeferredModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        with _lock:  # another thread may be loading it
            if is_deferred(self) and (not name.startswith("__") or name == "__all__"):
                load(self)
                return getattr(self, name)
        return super().__getattribute__(name)


class _DeferredLoader(Loader):
    """Loader that puts off the work of another one."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(DEFERRED[module.__name__])
        module.__class__ = _DeferredModule

    def load(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if module.__name__ == "torch._dynamo":
            _forget_disabled()


class _LoadedLoader(Loader):
    """Loader of a submodule that its package has imported while the import system was looking for it."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    """Finder of deferred modules and of the other submodules of deferred packages."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = sys.modules.get(fullname.rpartition(".")[0])
        if fullname in DEFERRED:
            # torch._dynamo.utils is deferred beside a deferred torch._dynamo, not after torch._dynamo has been loaded.
            if package is not None and package.__name__ in DEFERRED and not is_deferred(package):
                return None
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _DeferredLoader(spec.loader)
            return spec
        if package is None or not is_deferred(package):
            return None
        load(package)
        module = sys.modules.get(fullname)
        return None if module is None else ModuleSpec(fullname, _LoadedLoader(module))


# --- answers --------------------------------------------------------------------------------------------------------


class _Name:
    """Stand-in for a function or class: loads its module when called or asked for an attribute; no object is of it."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _real(self) -> Any:
        module = importlib.import_module(self._module)
        load(module)
        return getattr(module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __instancecheck__(self, instance: object) -> bool:
        module = sys.modules.get(self._module)
        return module is not None and not is_deferred(module) and isinstance(instance, self._real())


def _names(module: str, *names: str) -> dict[str, Any]:
    return {name: _Name(module, name) for name in names}


_disabled: list[Any] = []


def _disable(function: Callable[..., Any], *args: object, **kwargs: object) -> Callable[..., Any]:
    """Answer ``torch._dynamo.disable``: without a compiler there is nothing to disable."""
    _disabled.append(function)
    return function


def _forget_disabled() -> None:
    """Make torch ask again for the functions that it keeps on :func:`_disable`'s word: now there is a compiler."""
    while _disabled:
        vars(_disabled.pop()).pop("__dynamo_disable", None)


def _graph_break(*args: object, **kwargs: object) -> None:
    """Answer ``torch._dynamo.graph_break``, which does nothing outside a compiled function."""


DEFERRED: Mapping[str, Mapping[str, Any]] = {
    # Lightning's wrappers; every optimizer
    "torch._dynamo": {
        **_names("torch._dynamo", "OptimizedModule"),
        "disable": _disable,
        "graph_break": _graph_break,
    },
    # torchvision.ops.roi_align
    "torch._dynamo.utils": _names("torch._dynamo.utils", "is_compile_supported"),
    # torchmetrics, which adds this name if scipy.signal does not have it
    "scipy.signal": _names("scipy.signal.windows", "hamming"),
    # every metric of torchmetrics
    "torchmetrics.utilities.plot": {
        **_names("torchmetrics.utilities.plot", "plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val"),
        "_AX_TYPE": _Name("matplotlib.axes", "Axes"),
        "_CMAP_TYPE": object,
        "_PLOT_OUT_TYPE": object,
    },
}
"""Module -> the names that its importers copy or call, with what to give them until the module is loaded."""
