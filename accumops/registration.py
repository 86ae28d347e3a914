"""Registers accumops' Keras classes as soon as Keras is there, although `import accumops` imports neither.

`keras.models.load_model` finds a custom class only if the class's module has been imported before. A plain
`import accumops` must be enough for that, before or after `import keras`:

- If Keras is imported already, `register` imports the classes at once. TensorFlow is there, so this is cheap.
- Otherwise `register` puts a finder on `sys.meta_path`, which imports the classes once Keras has been imported, and
  then removes itself.

The classes cannot be imported while a module that they need is half-imported. TensorFlow imports Keras before its own
import is complete, and so does a module of accumops that is imported directly. So the finder follows the imports of
TensorFlow, Keras and accumops, and acts when the last of those under way is complete.
"""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register(modules: Sequence[str]) -> None:
    """Imports modules that register classes with Keras: now if Keras is imported, and otherwise once it is.

    Args:
        modules: The modules' full names.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):  # accumops may be reloaded
        finder = _Finder(modules)
        sys.meta_path.insert(0, finder)
        finder.act()


class _Finder:
    """Finds modules as the finders after it do, and learns when their code has run."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.running: list[str] = []  # shared by all threads; append and remove are atomic
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in ("tensorflow", "keras") and not name.startswith("accumops."):
            return None
        finders = list(sys.meta_path)
        if self not in finders:  # another thread has just removed it
            return None
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def act(self) -> None:
        """Imports the modules and removes the finder, unless it is too early or too late for that."""
        if self.running or "keras" not in sys.modules or self not in sys.meta_path:
            return
        self.running.append("accumops")  # the imports below come back here
        try:
            for module in self._modules:
                importlib.import_module(module)
        except Exception as error:
            # Keras works without accumops, so its import goes on. The first use of a name of accumops raises the error.
            # If another thread is importing one of the modules, this may be a deadlock that Python has resolved; that
            # thread then comes here, too.
            if self.running == ["accumops"]:
                warnings.warn(f"accumops' classes are not registered with Keras: {error}", RuntimeWarning, stacklevel=2)
            return
        finally:
            self.running.remove("accumops")
        with contextlib.suppress(ValueError):  # another thread was faster
            sys.meta_path.remove(self)


class _Loader:
    """Loads a module as its own loader does, and tells the finder."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.running.append(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.running.remove(module.__name__)
        self._finder.act()
