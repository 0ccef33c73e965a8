"""Reach into another package when its module is imported: run a function then, and wrap functions of it.

`import hf_blr` must reach into transformers' loader and PEFT's config, but importing those itself would
double the time that it takes, and bring in what a user may never need.
"""

from __future__ import annotations

import functools
import importlib.abc
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]

#: the mark of a function of another package that is wrapped by ours; others' wrappers around it carry it on
WRAPPED = "hf_blr_wrapper"

_waiting: dict[str, list[Callback]] = {}


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` right after the module's first import, or now if that has been."""
    if name in sys.modules:
        callback(sys.modules[name])
        return
    callbacks = _waiting.setdefault(name, [])
    if callback not in callbacks:
        callbacks.append(callback)
    if not any(isinstance(finder, CallbackFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CallbackFinder())


def wrap_once(owner: Any, name: str, wrapper_of: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrapper_of(function)` in the place of `owner.name`; where that has been done already, nothing.

    Of a class method the function takes the class first, and its wrapper becomes one.
    """
    found = inspect.getattr_static(owner, name)
    of_class = isinstance(found, classmethod)
    original = found.__func__ if of_class else found
    if hasattr(original, WRAPPED):
        return
    wrapper = functools.wraps(original)(wrapper_of(original))
    setattr(wrapper, WRAPPED, True)
    setattr(owner, name, classmethod(wrapper) if of_class else wrapper)


class CallbackFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find an awaited module, and adds the callbacks to its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for callback in _waiting.pop(fullname, []):
                callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
