"""The README of an expert's repository: metadata for the Hub, and a description for people."""

from __future__ import annotations

import json
import re
from typing import Any

from experthub.hub.files import yaml_files
from experthub.hub.files.safe_text import escape, is_reference
from experthub.hub.formats.adapter import ADAPTER, GATES
from experthub.hub.kinds import ExpertKind, kinds
from experthub.hub.registry.expert import Expert, Identity
from experthub.hub.registry.registry import Registry


def format_model_card(
    expert: Expert, identity: Identity, registry: Registry, repository: str
) -> str:
    """Format a model card: metadata, description, scores, training and usage.

    Args:
        expert: The expert.
        identity: The identity of its content.
        registry: The registry, which may have the base's name on the Hub.
        repository: The repository of the card, `org/name`.

    Returns:
        Markdown with a YAML header.
    """
    known = registry.list_bases().get(expert.base)
    base = known.aka[0] if known and known.aka else expert.base
    kind = kinds[expert.kind]
    metadata: dict[str, Any] = {
        "library_name": "peft" if kind.peft else "transformers" if kind.load else "experthub",
        "base_model": base,
        "base_model_relation": "adapter" if kind.peft else "finetune" if kind.load else None,
        "license": expert.license,
        "datasets": [expert.task.partition(":")[2].split("/")[0]] if expert.task else None,
        "tags": [
            "experthub",
            *(["lora", f"base_model:adapter:{base}"] if kind.peft else []),
            *expert.tags,
        ],
    }
    given = {key: _escape_values(value) for key, value in metadata.items() if value}
    parts = [
        f"---\n{yaml_files.dump(given)}---\n",
        f"# {expert.name}\n\n{_as_text(expert.description)}\n",
        _format_facts(expert, identity, base),
        _format_scores(expert),
        _format_usage(repository, base, kind),
    ]
    return "\n".join(part for part in parts if part)


def _escape_values(value: Any) -> Any:
    """Escape what is not printable in a text, or in each text of a list."""
    return [escape(text) for text in value] if isinstance(value, list) else escape(value)


def _as_text(text: str) -> str:
    """Return a text of somebody else as one line of Markdown that shows it as it is."""
    line = re.sub(r"([\\`*\[\]<>|~&])", r"\\\1", escape(" ".join(text.split())))
    return re.sub(r"^([#=+-]|[0-9]+(?=[.)]))", r"\\\1" if line[:1] in "#=+-" else r"\1\\", line)


def _as_code(value: object) -> str:
    """Return a value as code in a cell of a table; a longer fence allows backticks in it."""
    text = escape(str(value)).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _format_facts(expert: Expert, identity: Identity, base: str) -> str:
    """Format the table of facts."""
    rows = {
        "kind": expert.kind,
        "base": base,
        "trained on": expert.task,
        "digest": identity.digest,
        "base's fingerprint": identity.base_fingerprint,
        "gates": "yes" if GATES in identity.files else None,
    }
    training = {k: v for k, v in expert.training.items() if not isinstance(v, dict)}
    rows["training"] = ", ".join(f"{k} {v}" for k, v in training.items()) or None
    lines = [f"| {name} | {_as_code(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"


def _format_scores(expert: Expert) -> str:
    """Format the table of scores, if there are scores."""
    if not expert.scores:
        return ""
    head = [
        "## Scores",
        "",
        "| task | split | n | base | expert |",
        "| --- | --- | --: | --: | --: |",
    ]
    rows = [
        f"| {_as_text(s.task)} | {_as_text(s.split)} | {s.n} | {s.base:.3f} | {s.expert:.3f} |"
        for s in expert.scores
    ]
    return "\n".join([*head, *rows]) + "\n"


def _format_usage(repository: str, base: str, kind: ExpertKind) -> str:
    """Format the section that shows how an expert of this kind is used."""
    text = f"## Use\n\n`hub pull hf:{repository}` fetches and verifies it.\n"
    if kind.key != "experts":
        text += f"""
A recipe names it under `{kind.key}:`, beside the experts that it was made for:

```yaml
{kind.key}: hf:{repository}
```
"""
    if kind.load:
        text += f"""
`hub compose recipe.yaml` composes it with a recipe:

```yaml
base: {base if is_reference(base) else json.dumps(base)}
experts: [hf:{repository}]
merge: {{method: linear}}
```
"""
    if kind.peft:
        text += f"""
peft loads the file `{ADAPTER}`:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, {json.dumps(repository)})  # base: the model {escape(base)}
```
"""
    return text
