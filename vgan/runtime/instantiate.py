"""Build the object named by the _target_ of a config node."""

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import hydra.utils

from vgan.runtime.errors import UserError, first_line
from vgan.runtime.renamed import TARGETS


def locate(target: object, node: str) -> Any:
    """Return the class or function that `_target_` names. Raises UserError if there is none."""
    try:
        return hydra.utils.get_object(TARGETS.get(str(target), str(target)))
    except (ImportError, ValueError, AttributeError) as e:
        raise UserError(
            f"{node}._target_={target}: cannot be imported ({first_line(e)}); "
            "give the full dotted name"
        ) from e


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a YAML value fits an annotation; True for types that YAML does not have."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        item = args[0] if args else Any
        return isinstance(value, (list, tuple)) and all(_fits(v, item) for v in value)
    if annotation is type(None):
        return value is None
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, (int, float))
    if annotation in (bool, int, str):
        return isinstance(value, annotation)
    return True


def _shown(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("collections.abc.", "")


def construct(config: Mapping[str, Any], node: str, /, **injected: Any) -> Any:
    """Call config['_target_'] with the other keys of the node and the injected arguments.

    Raises UserError, with `node` and the key, for an unknown or missing argument, a value of the
    wrong type, and for a ValueError of the target.
    """
    if "_target_" not in config:
        raise UserError(
            f"{node}: has no _target_; give a class, such as vgan.models.generator.Generator"
        )
    target = locate(config["_target_"], node)
    arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    signature = inspect.signature(target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name, value in arguments.items():
        if name not in signature.parameters and not open_ended:
            known = ", ".join(p for p in signature.parameters if p not in injected)
            raise UserError(
                f"{node}.{name}={value}: {config['_target_']} has no such argument; "
                f"it takes {known}"
            )
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{node}.{name}={value}: must be {_shown(hints[name])}")
    for p in signature.parameters.values():
        required = p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        if required and p.name not in arguments and p.name not in injected:
            raise UserError(f"{node}.{p.name}: is missing; {config['_target_']} needs it")
    try:
        return hydra.utils.instantiate(
            {"_target_": config["_target_"]}, **arguments, **injected, _convert_="all"
        )
    except hydra.errors.InstantiationException as e:
        if isinstance(e.__cause__, UserError):
            raise e.__cause__ from None
        if isinstance(e.__cause__, ValueError):
            raise UserError(f"{node}.{e.__cause__}") from e
        raise


def _names_code(value: Any) -> bool:
    """Return whether an argument contains a _target_, which Hydra would build."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_code, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_code, value))


def require_own(node: Mapping[str, Any], name: str, package: str, fix: str) -> None:
    """Raise UserError unless the node of a checkpoint names a class defined in `package` of vgan.

    A checkpoint must not choose code to run. The name may start like one of vgan and lead out of
    it (vgan.data.folder.os.system), and Hydra would also build arguments that have a _target_.
    """
    target = str(node.get("_target_"))
    found = locate(target, name) if target.startswith(f"{package}.") else None
    own = inspect.isclass(found) and f"{found.__module__}.".startswith(f"{package}.")
    if not own or any(map(_names_code, node.values())):
        raise UserError(
            f"{name}._target_={target}: a checkpoint may name vgan's own classes only; {fix}"
        )


def construct_own(node: Mapping[str, Any], name: str, sizes: Mapping[str, Any]) -> Any:
    """Build the network that a checkpoint describes. Raises UserError if it cannot be built."""
    require_own(node, name, "vgan.models", "build yours in Python")
    try:
        return construct(node, name, **sizes)
    except hydra.errors.InstantiationException as e:
        raise UserError(
            f"{name}: the checkpoint describes no network ({e.__cause__}); use an intact one"
        ) from e
