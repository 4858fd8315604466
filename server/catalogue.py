"""Every method described: what it is, what its clients send and in how many bytes, and where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from inspect import cleandoc
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Question
from aggregators.core.registry import methods, parse
from aggregators.core.update import Gradients

SENTENCE = re.compile(r"(?<=\.)\s+(?=[^\Wa-z\d]|`)")  # between a full stop and what may begin a sentence
LAYERWISE = {  # what it is, and its bytes
    "gram": ("Σxxᵀ", "4i²"),
    "grad_gram": ("Σδδᵀ", "4o²"),
    "moments": ("moments", "8o + 8"),
    "cross_moments": ("corr(a, b)", "4o²"),
}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
NOTE = (
    "Bytes are those of float32, from one client. Sums are over single examples; a layer has i inputs, the constant 1"
    " among them, and o outputs; counts of classes are left aside."
)


class Description(NamedTuple):
    """What a docstring says: its summary, its first formula (perhaps the summary), its source; empty where it lacks."""

    summary: str
    formula: str
    source: str

    @property
    def papers(self) -> list[str]:
        """Authors and year of each paper."""
        found = (re.match(r'[^"]*?\b(?:19|20)\d\d\b', part) for part in self.source.split("; "))
        return [paper[0] for paper in found if paper]


def describe(cls: type[Aggregator]) -> Description:
    """The first paragraph; the first sentence with = or ←, up to its `where`; the sentence after `Source:`."""
    said, _, source = cleandoc(cls.__doc__ or "").partition("Source: ")
    summary, _, rest = said.partition("\n\n")
    sentences = [_line(text) for text in (summary, *SENTENCE.split(rest))]
    formula = next((sentence for sentence in sentences if re.search("[=←]", sentence)), "")
    return Description(sentences[0], re.split(", (?:where|for each) ", formula)[0], _line(SENTENCE.split(source)[0]))


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def example(kind: str) -> Aggregator:
    """The method of that kind with its default settings, a method of methods with the first of its `inners`."""
    cls = methods()[kind]
    return parse({"kind": kind, **({"inner": cls.inners[0]} if "inner" in cls.model_fields else {})})


def answered(question: Question) -> str:
    """What a client answers, such as `weights, Σg²`."""
    request, gradients = question.request, question.request.gradients or Gradients()
    parts = {
        "weights": question.task == "train",
        "Σg": gradients.sums,
        "Σg²": gradients.squares,
        f"{gradients.sketches} sketches": gradients.sketches,
        **{name: getattr(request, field) for field, (name, _) in LAYERWISE.items()},
        "class counts": request.class_counts,
    }
    return ", ".join(part for part, asked in parts.items() if asked) or "metrics"


def upload(questions: Iterable[Question]) -> str:
    """The bytes that a client sends to answer: `8 a parameter`, or `4 a parameter, 4i² + 4o² a layer`."""
    numbers, layers = 0, []
    for task, request in questions:
        gradients = request.gradients or Gradients()
        numbers += (task == "train") + gradients.sums + gradients.squares + gradients.sketches
        layers += [size for field, (_, size) in LAYERWISE.items() if getattr(request, field)]
    return f"{4 * numbers} a parameter" + (f", {' + '.join(layers)} a layer" if layers else "")


def table() -> Group:
    """A row for every method."""
    rows = Table("method", show_lines=True)
    for column, width in {"what it is": 52, "clients answer, bytes": 21, "paper": 15}.items():
        rows.add_column(column, width=width)
    for kind, cls in methods().items():
        method, about = example(kind), describe(cls)
        questions = [*method.questions()]
        rows.add_row(
            "\n  of ".join(part.kind for part in method.parts()),
            Text("\n".join(dict.fromkeys([about.summary, about.formula]))),
            "\n".join([*map(answered, questions), upload(questions)]),
            "\n".join(about.papers),
        )
    return Group(rows, f"{NOTE} A method of methods stands with the simplest inner one, whose bytes are included.")


def page(method: Aggregator) -> Group:
    """All about one method: its docstring, its settings, and what it asks as it is set."""
    settings = Table("setting", "value", "allowed", "what it is", title="Settings, as they are unless given")
    values = {**method.model_dump(mode="json"), **method.model_dump(mode="json", exclude_unset=True)}
    schemas = type(method).model_json_schema()["properties"]
    for name in (name for name in schemas if name != "kind"):
        about = schemas[name].get("description", "")
        settings.add_row(name, Text(shown(values[name])), allowed(schemas[name]), Text(about))
    exchanges = Table("exchange", "clients answer", "bytes", title="A round, as it is set")
    for number, question in enumerate(method.questions(), 1):
        exchanges.add_row(f"{number} {question.task}", answered(question), upload([question]))
    return Group(Text(method.kind, style="bold"), Text(cleandoc(method.__doc__ or "")), settings, exchanges, NOTE)


def shown(value: object) -> str:
    """A setting's value as it is written in JSON, a text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def allowed(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, such as `number from 0 to 1 or null`."""
    if options := schema.get("anyOf"):
        return " or ".join(map(allowed, options))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(values)
    if "additionalProperties" in schema:
        return f"by client: {allowed(schema['additionalProperties'])}"
    limits = [f"{word} {schema[key]:g}" for key, word in LIMITS.items() if key in schema]
    return " ".join([TYPES[schema["type"]] if "type" in schema else "a method", *limits])
