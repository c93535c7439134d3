"""Build the object that a config node names: the only place where a name in a config becomes Python."""

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import hydra.utils

from vgan.runtime.errors import UserError
from vgan.runtime.renamed import TARGETS


def locate(target: object, node: str) -> Any:
    """The class or function that `_target_` names; raises UserError if there is none."""
    try:
        return hydra.utils.get_object(TARGETS.get(str(target), str(target)))
    except (ImportError, ValueError, AttributeError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"{node}._target_={target}: cannot be imported ({reason}); give the full dotted name"
        ) from e


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value suits a constructor's annotation; what cannot be said in YAML is let through."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin in (list, tuple, Sequence) or (
        isinstance(origin, type) and issubclass(origin, Sequence)
    ):
        items = args[:1] if args else ()
        return isinstance(value, (list, tuple)) and all(_fits(v, a) for v in value for a in items)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return True


def _called(annotation: Any) -> str:
    return (
        annotation.__name__
        if isinstance(annotation, type)
        else str(annotation).replace("collections.abc.", "")
    )


def construct(config: Mapping[str, Any], node: str, /, **injected: Any) -> Any:
    """Call config['_target_'] with the node's other keys and the injected sizes.

    Raises UserError for a key that the target does not take, one that it lacks, a value of the wrong type, and for what
    the target itself refuses; each names `node` and the key.
    """
    if "_target_" not in config:
        raise UserError(
            f"{node}: has no _target_; name a class, such as vgan.models.generator.Generator"
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
                f"{node}.{name}={value}: {config['_target_']} has no such argument; it takes {known}"
            )
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{node}.{name}={value}: must be {_called(hints[name])}")
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind is p.POSITIONAL_OR_KEYWORD
        and p.name not in arguments
        and p.name not in injected
    ]
    if missing:
        raise UserError(f"{node}.{missing[0]}: is missing; {config['_target_']} needs it")
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
    """Whether Hydra would find a _target_ somewhere in an argument."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_code, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_code, value))


def require_own(node: Mapping[str, Any], name: str, package: str, fix: str) -> None:
    """Raise UserError unless the node, which a checkpoint wrote, names a class that is defined in `package` of vgan.

    A checkpoint must not choose code to run, and a name that begins like vgan's may lead out of it: vgan.data.folder.os.system.
    Nor may its arguments, which Hydra would build as well.
    """
    target = str(node.get("_target_"))
    found = locate(target, name) if target.startswith(f"{package}.") else None
    own = inspect.isclass(found) and f"{found.__module__}.".startswith(f"{package}.")
    if not own or any(map(_names_code, node.values())):
        raise UserError(
            f"{name}._target_={target}: a checkpoint may name vgan's own classes only; {fix}"
        )


def construct_own(node: Mapping[str, Any], name: str, sizes: Mapping[str, int]) -> Any:
    require_own(node, name, "vgan.models", "build yours by hand")
    try:
        return construct(node, name, **sizes)
    except (
        hydra.errors.InstantiationException
    ) as e:  # the checkpoint's fault, not the user's own class
        raise UserError(
            f"{name}: the checkpoint describes no network ({e.__cause__}); use an intact one"
        ) from e
