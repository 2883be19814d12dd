"""YAML 1.2 with line numbers, and pydantic errors that name the file, the line and the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experthub.hub.errors import UsageError
from experthub.hub.files.spelling import suggest_name
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 100
MAX_DIGITS = 1000  # Python refuses to print numbers of more than some thousand digits.
INTEGER = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
CONSTANTS: dict[str, bool | float | None] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True)
CONSTANTS |= dict.fromkeys(("false", "False", "FALSE"), False)
INFINITIES = [sign + word for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")]
CONSTANTS |= {word: float(word.replace(".", "")) for word in (*INFINITIES, ".nan", ".NaN", ".NAN")}
Where = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)


class Closed(BaseModel):
    """A frozen record that rejects unknown keys and lists the keys that it has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, value: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in value if isinstance(value, dict) else ():
            if key not in known:
                shown = str(key).encode(errors="backslashreplace").decode()
                context = {"key": shown, "known": ", ".join(known)}
                raise PydanticCustomError("unknown_key", "unknown key {key}", context)
        return value


@dataclass(frozen=True)
class Document:
    """A parsed YAML text: its plain values, and the lines where they stand.

    Attributes:
        value: The plain values.
        lines: The line, from 1, of every key and item by its path.
        name: The name of the file, for error messages.
    """

    value: Any
    lines: dict[Where, int]
    name: str

    def at(self, where: Where) -> str:
        """Describe the place of a value.

        Args:
            where: The path of the value: keys and positions.

        Returns:
            `file, line N` of the value, or of its nearest parent that has a line.
        """
        for length in range(len(where), -1, -1):
            line = self.lines.get(where[:length])
            if line:
                return f"{self.name}, line {line}"
        return self.name


def read(path: Path) -> Document:
    """Read a YAML file.

    Args:
        path: The file, of at most `MAX_YAML_BYTES` bytes.

    Returns:
        The values and their lines.

    Raises:
        UsageError: The file is too large, is not UTF-8 or is not YAML, sets a key twice, or uses
            aliases, tags or merge keys.
    """
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UsageError(
            f"{path} is larger than {MAX_YAML_BYTES} bytes",
            "check that it is a recipe or a registry",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text: {error}", "save it as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Parse a YAML text.

    Args:
        text: The text.
        name: The name of its file, for error messages.

    Returns:
        The values and their lines.

    Raises:
        UsageError: The text is not YAML, sets a key twice, or uses aliases, tags or merge keys.
    """
    import yaml

    events = yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    reader = _Reader(iter(events), name)
    try:
        return Document(reader.document(), reader.lines, name)
    except yaml.MarkedYAMLError as error:
        place = f"{name}, line {error.problem_mark.line + 1}" if error.problem_mark else name
        hint = "check indentation, quotes and brackets"
        raise UsageError(f"{place}: {error.problem or 'not YAML'}", hint) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{name}: not YAML: {str(error).splitlines()[0]}", "check the file"
        ) from None


class _Reader:
    """A builder of plain values from a parser's events, which also records their lines."""

    def __init__(self, events: Iterator[Any], name: str) -> None:
        self.events, self.name = events, name
        self.lines: dict[Where, int] = {}

    def document(self) -> Any:
        """Read the only document of the text; return None for an empty text."""
        value = None
        for count, event in enumerate(self._documents()):
            if count:
                raise self._error(
                    event, "a second document starts here", "keep one document in a file"
                )
            value = self._value(next(self.events), ())
            next(self.events)
        return value

    def _documents(self) -> Iterator[Any]:
        for event in self.events:
            if type(event).__name__ == "DocumentStartEvent":
                yield event

    def _value(self, event: Any, where: Where) -> Any:
        kind = type(event).__name__
        if kind == "AliasEvent":
            raise self._error(event, "aliases are not supported", "write the value out")
        if event.tag is not None and event.tag != "!":
            raise self._error(
                event, f"the tag {event.tag} is not supported", "write plain YAML without tags"
            )
        if len(where) > MAX_DEPTH:
            what = f"the values are nested deeper than {MAX_DEPTH} levels"
            raise self._error(event, what, "check that it is the right file")
        if kind == "SequenceStartEvent":
            return self._items(where)
        if kind == "MappingStartEvent":
            return self._entries(where)
        return event.value if event.style else _scalar(event.value)

    def _items(self, where: Where) -> list[Any]:
        items: list[Any] = []
        while type(event := next(self.events)).__name__ != "SequenceEndEvent":
            place = (*where, len(items))
            self.lines[place] = event.start_mark.line + 1
            items.append(self._value(event, place))
        return items

    def _entries(self, where: Where) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while type(event := next(self.events)).__name__ != "MappingEndEvent":
            key = getattr(event, "value", None)
            if key is None or event.tag not in (None, "!"):
                raise self._error(event, "the key is not text", "write key: value")
            if key == "<<" and not event.style:
                raise self._error(event, "merge keys are not supported", "write the keys out")
            if key in entries:
                raise self._error(event, f"the key {key!r} is set twice", "remove one of them")
            place = (*where, key)
            self.lines[place] = event.start_mark.line + 1
            entries[key] = self._value(next(self.events), place)
        return entries

    def _error(self, event: Any, what: str, hint: str) -> UsageError:
        return UsageError(f"{self.name}, line {event.start_mark.line + 1}: {what}", hint)


def _scalar(text: str) -> Any:
    """Convert a plain scalar by the core schema of YAML 1.2 (section 10.3.2)."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if re.fullmatch(INTEGER, text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits is too long")
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text) if re.fullmatch(FLOAT, text) else text


def validate(model: type[Model], document: Document, guide: str = "docs/recipes.md") -> Model:
    """Validate a document as a pydantic model.

    Args:
        model: The class of the model.
        document: The values and their lines.
        guide: The page that describes the format, for the hint.

    Returns:
        The model.

    Raises:
        UsageError: The document does not fit the model. The message names file, line and key, and
            the hint suggests a similar key for an unknown one.
    """
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        raise convert_error(error, document, guide) from None


def convert_error(error: ValidationError, document: Document, guide: str) -> UsageError:
    """Convert an error of pydantic to an error with one sentence and a hint.

    Args:
        error: The error of pydantic; an unknown key is reported before all other problems.
        document: The document that was validated.
        guide: The page that describes the format, for the hint.

    Returns:
        The error, which names file, line and key.
    """
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    where = _in_document(document, first["loc"])
    if first["type"] == "unknown_key":
        key, known = first["ctx"]["key"], first["ctx"]["known"].split(", ")
        return UsageError(
            f"{document.at((*where, key))}: unknown key {key!r}", suggest_name(key, known)
        )
    if first["type"] == "hub_error":
        context = first["ctx"]
        where = _in_document(document, (*where, context["key"]))
        return UsageError(f"{document.at(where)}: {context['message']}", context["hint"])
    key, place = ".".join(map(str, where)), document.at(where)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = f"the key {str(first['loc'][-1])!r} is missing"
    elif first["type"] == "too_short" and not first["input"]:
        message = "the list is empty, and needs at least 1 item"
    return UsageError(
        f"{place}: {key}: {message}" if key else f"{place}: {message}",
        f"see {guide} for the format",
    )


def _in_document(document: Document, location: Iterable[int | str]) -> Where:
    """Remove the parts of a pydantic location that are not keys, such as the arms of a union."""
    where: Where = ()
    for part in location:
        if (*where, part) in document.lines:
            where = (*where, part)
    return where


def dump(value: Any) -> str:
    """Write plain values as YAML.

    Args:
        value: Mappings, lists, texts, numbers, booleans and None.

    Returns:
        The YAML text, in which YAML 1.1 and YAML 1.2 read the same values.
    """
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        """A dumper that also quotes texts that YAML 1.2 reads as numbers, and writes no aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    for tag, pattern in (("int", INTEGER), ("float", FLOAT)):
        signs = list("-+.0123456789")
        Dumper.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), signs
        )
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text
