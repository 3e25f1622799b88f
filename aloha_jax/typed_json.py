"""JSON values as the types that annotations name."""

import types
import typing
from typing import Any, Literal


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` from JSON as what the annotation `hint` says, tuples restored and whole numbers taken for floats.

    Args:
        value: from `json.loads`.
        hint: bool, int, float, str, a `Literal` of strings, or a tuple or an optional of such.
        where: what the value is called in an error.

    Raises:
        ValueError: it is something else.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else typed(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        raise ValueError(f"{where} is one of {', '.join(args)}; not {value!r}")
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ValueError(f"{where} must be a list like {hint}, not {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(typed(v, kind, where) for v, kind in zip(value, kinds, strict=True))
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value
