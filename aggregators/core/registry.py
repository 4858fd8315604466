"""Configuration -> method. Dropping a file into the package registers the method that is in it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, PlainValidator, SerializeAsAny, ValidationError

import aggregators

from .base import Aggregator


def _final(cls: type[Any]) -> Iterator[type[Aggregator]]:
    for sub in cls.__subclasses__():
        if not inspect.isabstract(sub) and sub.__module__.startswith("aggregators."):
            yield sub
        yield from _final(sub)


@cache
def methods() -> Mapping[str, type[Aggregator]]:
    """Every final method in the package by its kind; TypeError when two claim one kind."""
    for module in walk_packages(aggregators.__path__, "aggregators."):
        import_module(module.name)
    found: dict[str, type[Aggregator]] = {}
    for cls in _final(Aggregator):
        kind: str = cls.model_fields["kind"].default
        if found.setdefault(kind, cls) is not cls:
            raise TypeError(f"two methods of kind {kind!r}: {found[kind]} and {cls}: rename one")
    return dict(sorted(found.items()))


def as_mapping(config: object) -> Mapping[str, Any]:
    """`'fisher'`, a JSON object as text, or a mapping, as a mapping with a `kind`; ValueError in one line."""
    if isinstance(config, str):
        config = _from_json(config) if config.lstrip().startswith("{") else {"kind": config}
    if not isinstance(config, Mapping) or not isinstance(config.get("kind"), str):
        raise ValueError(f'{config!r}: give a name, or an object with a "kind", such as \'{{"kind": ...}}\'')
    return config


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not valid JSON: {error}") from None


def external(kind: str, base: type[BaseModel]) -> Any:
    """The final subclass of `base` that `module:Class` names; ValueError in one line when there is none."""
    module, _, name = kind.partition(":")
    if not all(map(str.isidentifier, module.split("."))):
        raise ValueError(f"{kind!r}: {module!r} is no module's name: write module:Class")
    try:
        cls = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{kind!r}: cannot import {module!r}: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, base)) or inspect.isabstract(cls):
        raise ValueError(f"{kind!r} is no final subclass of {base.__module__}:{base.__name__}")
    return cls


def unknown(what: str, value: str, allowed: Iterator[str] | list[str]) -> str:
    """One line that names an unknown value, the nearest allowed one, and all that are."""
    names = sorted(allowed)
    near = get_close_matches(value, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {value!r}{hint}; allowed: {', '.join(names)}"


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """A pydantic error in one line: each key, its value, and what is allowed."""
    lines = "; ".join(_explained(detail, cls) for detail in error.errors(include_url=False))
    return " ".join(lines.split())


def _explained(detail: Any, cls: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
        allowed = [field.alias or name for name, field in cls.model_fields.items()]
        return f"{unknown('key', key, allowed)} (its value: {detail['input']!r})"
    if detail["type"] == "missing":
        return f"{key}: missing; give it a value"
    message: str = detail["msg"]
    own = message.removeprefix("Value error, ")  # ours as it stands, pydantic's in lower case
    said = message[:1].lower() + message[1:] if own == message else own
    return f"{key or cls.__name__} = {detail['input']!r}: {said}"


def validated(cls: type[Any], config: Mapping[str, Any]) -> Any:
    """`cls` made from `config`; ValueError in one line that names the key, the value and what is allowed."""
    try:
        return cls.model_validate(config)
    except ValidationError as error:
        raise ValueError(explain(error, cls)) from None


def parse(config: object) -> Aggregator:
    """The method that `config` describes: a name, a JSON object as text, a mapping, or a method already made.

    A method outside the package is named `module:Class`. Raises ValueError in one line.
    """
    if isinstance(config, Aggregator):
        return config
    mapping = as_mapping(config)
    kind = mapping["kind"]
    if ":" not in kind and kind not in methods():
        raise ValueError(unknown("aggregation method", kind, list(methods())))
    cls = external(kind, Aggregator) if ":" in kind else methods()[kind]
    method: Aggregator = validated(cls, mapping)
    return method


def of_one_width(inner: Aggregator) -> Aggregator:
    """`inner`, unless its merge may have other widths than θ_t, or its clients: models are compared entry by entry."""
    for part in inner.parts():
        if "widths" in part.needs:
            raise ValueError(f"{part.kind} may change the model's widths, so nothing outside it can compare models")
    return inner


AnyAggregator: TypeAlias = Annotated[SerializeAsAny[Aggregator], PlainValidator(parse)]
OfOneWidth: TypeAlias = Annotated[AnyAggregator, AfterValidator(of_one_width)]
