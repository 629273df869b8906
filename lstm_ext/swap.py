"""One module class in the place of another inside a model: the Parameters, hooks and options stay, the code changes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.nn import LSTM, Module
from torch.nn.utils import parametrize

M = TypeVar("M", bound=Module)

_logger = logging.getLogger("lstm_ext")


def plain_class(module: Module) -> type[Module]:
    """The class of a module; of a parametrized one, the class that it had before."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def recast(cls: type[M], module: Module) -> M:
    """A module of class `cls` with everything the given one has; the Parameters and the hooks are shared."""
    if parametrize.is_parametrized(module):  # its class, made for it alone, has a property per parametrized tensor
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(type(module).__name__, (cls,), own)
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = module.__dict__[name].copy()
    if isinstance(new, LSTM):
        new._init_flat_weights()
    else:
        new.__dict__.pop("_flat_weights", None)
    return new


def _rebind_hooks(module: Module) -> None:
    """Hooks that hold their module by a weak reference get to know the new one; the old one may be gone soon."""
    hooks: dict[int, Any] = vars(module)["_load_state_dict_pre_hooks"]
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):
            hooks[key] = type(hook)(hook.hook, module)


def _obstacle(module: Module, classes: Mapping[type[Module], type[Module]]) -> str:
    """Why a module that is nearly one to replace is left alone; "" if it is none, or nothing is in the way."""
    cls = plain_class(module)
    if cls not in classes:
        base = next((base for base in classes if issubclass(cls, base)), None)
        return f"{cls.__name__} is a subclass of {_full_name(base)}" if base else ""
    return "its forward method was replaced" if "forward" in vars(module) else ""


def _full_name(cls: type[Module]) -> str:
    package = cls.__module__.partition(".")[0]
    return f"{package}.nn.{cls.__name__}" if package == "torch" else f"{package}.{cls.__name__}"


def swap(
    who: str,
    root: Module,
    classes: Mapping[type[Module], type[Module]],
    why_not: Callable[[Module], str] = lambda module: "",
) -> Module:
    """Replaces each module of a class in `classes` by one of the class that stands there.

    The logger "lstm_ext" is told each replacement (INFO); a warning says what was left alone and why.

    Args:
        who: the function that the messages name.
        root: the model.
        classes: what stands in for exactly which class.
        why_not: says why a module of another class is left alone, if that is to be told.

    Returns:
        `root`, or what replaces it.
    """
    paths: dict[Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path or "the module itself")
    replaced: dict[Module, Module] = {}
    for module, where in paths.items():
        if obstacle := _obstacle(module, classes) or why_not(module):
            warnings.warn(f"{who} leaves {', '.join(where)} alone: {obstacle}", stacklevel=3)
        elif cls := classes.get(plain_class(module)):
            new = replaced[module] = recast(cls, module)
            _rebind_hooks(new)
            _logger.info("%s: %s is now %s(%s)", who, ", ".join(where), _full_name(cls), new.extra_repr())
            if new._compiled_call_impl is not None:
                new._compiled_call_impl = None
                warnings.warn(f"{who}: {', '.join(where)} was compiled; call its compile() again", stacklevel=3)
    _logger.info("%s: %d modules replaced", who, len(replaced))
    for parent in (*paths, *replaced.values()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(root, root)
