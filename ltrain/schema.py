"""Dataclasses as a schema: their keys and types checked against plain data, and their documentation read from their source."""

import dataclasses
import difflib
import inspect
import io
import math
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

Where = Callable[[str], str]  # dotted key -> what gave it: 'in FILE', 'on the command line'


Choices = dict[str, tuple[str, ...]]  # field -> the texts it takes
Limits = dict[str, tuple[str, Callable[[Any], bool]]]  # field -> the words for what it takes, and the test; numbers without one: not negative
AT_LEAST_1: tuple[str, Callable[[Any], bool]] = ("at least 1", lambda x: x >= 1)
ABOVE_0: tuple[str, Callable[[Any], bool]] = ("above 0", lambda x: x > 0)


class ConfigError(ValueError):
    """A config that cannot be used, said in one sentence for the person who wrote it."""


def check_multiple(what: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise ConfigError(f"{what}={value} is not a multiple of {of}={unit}: write {math.ceil(value / unit) * unit}, or a {of} that divides {value}")


def divides_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether each rank can have as many heads, and of the K/V heads those that serve them."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def default_of(part: Any, name: str) -> Any:
    return getattr(type(part)(), name)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a schema, as `ltrain config schema` prints it."""

    name: str  # dotted
    type: str
    default: Any
    comment: str


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None."""
    known = list(known)
    by_case = {k.lower(): k for k in known}
    match = difflib.get_close_matches(word.lower(), by_case, n=1, cutoff=0.5)
    return by_case[match[0]] if match else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' where something known is near, otherwise '; the known ones are ...'."""
    known = list(known)
    near = closest(word, known)
    return f", did you mean {near}?" if near else f"; known: {', '.join(known)}"


@cache
def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def optional(hint: Any) -> tuple[Any, bool]:
    """`T | None` -> (T, True); any other hint -> (hint, False)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        assert len(inner) == 1, f"the schema has no union but with None: {hint}"
        return inner[0], True
    return hint, False


def type_name(hint: Any) -> str:
    """A type in the words of a config: `list of text`, `whole number or null`."""
    inner, nullable = optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is list:
        name = f"list of {type_name(args[0])}{'' if args[0] is str else 's'}"
    elif origin is dict or dataclasses.is_dataclass(inner):
        name = "mapping"
    else:
        name = {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(inner, "any")
    return f"{name} or null" if nullable else name


def is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def conform(hint: Any, value: Any, key: str, where: Where) -> Any:
    """`value` as plain data of the type `hint`: integral floats for integers, integers for floats, nothing else converted.

    Args: `key` is the dotted name of the value ('' for the whole config), `where` tells what gave a key, for the error.
    Interpolations (`${other.key}`) pass; their values are checked when they are resolved.
    Raises ConfigError for an unknown key or a wrong type.
    """
    if is_interpolation(value):
        return value
    inner, nullable = optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if value is None and nullable or inner is Any:
        return value
    if dataclasses.is_dataclass(inner) and isinstance(value, dict):
        assert isinstance(inner, type)
        return {name: conform(hints(inner)[name], v, _join(key, name), where) for name, v in _known(inner, value, key, where)}
    if origin is list and isinstance(value, list):
        return [conform(args[0], v, f"{key}[{i}]", where) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        # null takes an entry out again that an extended file put in
        return {str(k): None if v is None else conform(args[1], v, _join(key, str(k)), where) for k, v in value.items()}
    if isinstance(value, bool):
        if inner is bool:
            return value
    elif inner is int and isinstance(value, (int, float)) and math.isfinite(value) and value == int(value):
        return int(value)
    elif inner is float and isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    elif inner is str and isinstance(value, str):
        return value
    hint_quotes = ": write it in quotes" if inner is str and isinstance(value, (bool, int, float)) else ""
    raise ConfigError(f"{key or 'the config'} {where(key)} is {_shown(value)}, expected {_article(type_name(hint))}{hint_quotes}")


def _known(cls: type, value: dict[Any, Any], key: str, where: Where) -> Iterator[tuple[str, Any]]:
    names = [f.name for f in dataclasses.fields(cls)]
    for name, v in value.items():
        if name not in names:
            raise ConfigError(f"unknown key {_join(key, str(name))} {where(_join(key, str(name)))}{_key_suggestion(cls, key, str(name))}")
        yield name, v


def _key_suggestion(cls: type, key: str, name: str) -> str:
    """The closest key beside it, or the key of that very name elsewhere in the schema (`tensor` for `parallel.tensor`)."""
    beside = [_join(key, f.name) for f in dataclasses.fields(cls)]
    near = closest(_join(key, name), beside) if closest(name, [f.name for f in dataclasses.fields(cls)]) else None
    below = [k.name for k in keys(cls, key) if k.name.rsplit(".", 1)[-1] == name]
    if below:
        near = below[0]
    return f", did you mean {near}?" if near else f"; the keys there are {', '.join(beside)}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {value!r}" if isinstance(value, str) else str(value)


def _article(words: str) -> str:
    return words if words.startswith(("true", "any")) else f"a {words}"


def build(cls: type, data: dict[str, Any]) -> Any:
    """An instance of `cls` from conforming data; what is absent has its default."""
    values: dict[str, Any] = {}
    for name, value in data.items():
        inner, _ = optional(hints(cls)[name])
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            assert isinstance(inner, type)
            value = build(inner, value)
        elif (entry := _entries(inner)) is not None:
            value = {key: build(entry, v) if isinstance(v, dict) else v for key, v in value.items()}
        values[name] = value
    return cls(**values)


def _entries(hint: Any) -> type | None:
    """The dataclass of the entries of a mapping with free names, None for any other type."""
    args = typing.get_args(hint)
    return args[1] if typing.get_origin(hint) is dict and isinstance(args[1], type) and dataclasses.is_dataclass(args[1]) else None


@cache
def comments(cls: type) -> dict[str, str]:
    """Field -> the comment at the end of its line in the source of the dataclass, or of the one that it extends."""
    found = {name: comment for base in reversed(cls.__bases__) if dataclasses.is_dataclass(base) for name, comment in comments(base).items()}
    name, depth, start = "", 0, True
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.NAME and start and depth == 1:
            name = token.string
        elif token.type == tokenize.COMMENT and name:
            found[name] = token.string.lstrip("# ")
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.NEWLINE:
            name = ""
        start = token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    return found


def keys(cls: type, prefix: str = "") -> list[Key]:
    """Every key of a schema, those of nested dataclasses in their place."""
    found: list[Key] = []
    for f in dataclasses.fields(cls):
        inner, _ = optional(hints(cls)[f.name])
        name = _join(prefix, f.name)
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            found += keys(inner, name)
            continue
        if (entry := _entries(inner)) is not None:
            found.append(Key(name, type_name(inner), {}, comments(cls).get(f.name, "")))
            found += keys(entry, _join(name, "NAME"))
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        found.append(Key(name, type_name(hints(cls)[f.name]), default, comments(cls).get(f.name, "")))
    return found
