"""YAML 1.2 that remembers lines, and pydantic errors that name them."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experthub.hub.errors import UsageError
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

MAX_BYTES = 1 << 20
Where = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)


class Closed(BaseModel):
    """A frozen record that refuses unknown keys, and says which it knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, value: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in value if isinstance(value, dict) else ():
            if key not in known:
                context = {"key": str(key), "known": ", ".join(known)}
                raise PydanticCustomError("unknown_key", "unknown key {key}", context)
        return value


@dataclass(frozen=True)
class Document:
    """Plain values and the line, from 1, of every key and item."""

    value: Any
    lines: dict[Where, int]
    name: str

    def at(self, where: Where) -> str:
        """`file, line N` for a place in the document, or for its nearest parent."""
        for length in range(len(where), -1, -1):
            line = self.lines.get(where[:length])
            if line:
                return f"{self.name}, line {line}"
        return self.name


def read(path: Path) -> Document:
    """Read a YAML file; UsageError when it is none, when keys repeat, or when it uses aliases."""
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES} bytes", "is it a recipe or registry?")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text: {error}", "save it as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """As `read`, of a text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.events import AliasEvent, ScalarEvent

    yaml = YAML(pure=True)
    try:
        suspicious = "*" in text or "<<" in text  # a second pass over a large registry is slow
        for event in YAML(pure=True).parse(io.StringIO(text)) if suspicious else ():
            if isinstance(event, AliasEvent):
                line = event.start_mark.line + 1
                raise UsageError(f"{name}, line {line}: an alias", "write the value out")
            if isinstance(event, ScalarEvent) and event.value == "<<" and not event.style:
                line = event.start_mark.line + 1
                raise UsageError(f"{name}, line {line}: a merge key", "write the keys out")
        loaded = yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(
            f"{place}: {problem}", "check indentation, quotes and repeated keys"
        ) from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{name}: not YAML: {error}", "check the file") from None
    lines: dict[Where, int] = {}
    return Document(_plain(loaded, (), lines), lines, name)


def _plain(node: Any, where: Where, lines: dict[Where, int]) -> Any:
    if isinstance(node, dict):
        for key in node:
            lines[(*where, str(key))] = node.lc.key(key)[0] + 1  # type: ignore[attr-defined]
        return {str(key): _plain(value, (*where, str(key)), lines) for key, value in node.items()}
    if isinstance(node, list):
        for index in range(len(node)):
            lines[(*where, index)] = node.lc.item(index)[0] + 1  # type: ignore[attr-defined]
        return [_plain(value, (*where, index), lines) for index, value in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint for a word that is none of the known ones; prefix is put before the one it is like."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    return f"known: {', '.join(known)}" if known else ""


def validated(model: type[Model], document: Document, guide: str = "docs/recipes.md") -> Model:
    """The document as a model; UsageError names file, line and key, with a did-you-mean."""
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        raise as_usage_error(error, document, guide) from None


def as_usage_error(error: ValidationError, document: Document, guide: str) -> UsageError:
    """The first error of a validation, unknown keys before all others, as one sentence."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    where = _in_document(document, first["loc"])
    if first["type"] == "unknown_key":
        key, known = first["ctx"]["key"], first["ctx"]["known"].split(", ")
        return UsageError(
            f"{document.at((*where, key))}: unknown key {key!r}", did_you_mean(key, known)
        )
    if first["type"] == "hub_error":
        context = first["ctx"]
        where = _in_document(document, (*where, context["key"]))
        return UsageError(f"{document.at(where)}: {context['message']}", context["hint"])
    key, place = ".".join(map(str, where)), document.at(where)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = f"the key {str(first['loc'][-1])!r} is missing"
    return UsageError(
        f"{place}: {key}: {message}" if key else f"{place}: {message}",
        f"see {guide} for the format",
    )


def _in_document(document: Document, location: Iterable[int | str]) -> Where:
    """A pydantic location without the parts that name no key, such as the arms of a union."""
    where: Where = ()
    for part in location:
        if (*where, part) in document.lines:
            where = (*where, part)
    return where


def dump(value: Any) -> str:
    """Plain values as YAML."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 1000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue()
