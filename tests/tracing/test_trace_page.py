"""The page of a trace: one file, nothing from elsewhere, harmless whatever the prompt says."""

from __future__ import annotations

import json
import re
import webbrowser
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.composition.composition import Composition
from experthub.hub.tracing.page import DIGITS, TEMPLATE, pack_weights, render_page
from torch import Tensor

Make = Callable[..., Path]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=http://x.test onerror=alert(1)>",
    "<!--<script>",
    "]]>\"'&amp;\u2028\x00 __TRACE__ <\\/script>",
    "<style>*{display:none}</style></style></title>",
]


class Read(HTMLParser):
    """A page's tags with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    @property
    def trace(self) -> Any:
        return json.loads(self.scripts[0])


def unpacked(text: str, n_experts: int) -> list[list[int]]:
    """Rows of thousandths, by the format as it is described."""
    rows: list[list[int]] = []
    for row in text.split(","):
        if row == "=":
            rows.append(rows[-1])
            continue
        values = [DIGITS.index(a) * 64 + DIGITS.index(b) for a, b in re.findall("(.)(.)", row)]
        rows.append([0] * n_experts)
        for e, w in zip(values[::2], values[1::2], strict=True):
            rows[-1][e] = w
    return rows


@pytest.fixture
def recipe(expert_folder: Make, base_folder: Path) -> Path:
    folders = [expert_folder(e, targets=("q_proj", "up_proj")) for e in range(3)]
    path = Path("recipe.yaml")
    listed = ", ".join(f"{{expert: {f}, as: e{i}}}" for i, f in enumerate(folders))
    path.write_text(f"base: {base_folder}\nexperts: [{listed}]\nroute: {{method: phatgoose}}\n")
    return path


@pytest.fixture
def composition(recipe: Path) -> Composition:
    return hub.compose(recipe)


def test_the_page_holds_the_trace(composition: Composition) -> None:
    found = hub.trace(composition, ["one", "two"], new_tokens=2)
    read = Read(render_page(found))
    assert read.open == [] and len(read.scripts) == 2
    trace, record = read.trace, found.record()
    for name in ("composition", "base", "methods", "experts", "layers"):
        assert trace[name] == record[name]
    assert [t[0] for t in trace["tokens"]] == [t.text for t in found.tokens]
    assert [t[1:] for t in trace["tokens"]] == [[t.id, t.prompt, t.written] for t in found.tokens]
    assert trace["modules"] == [[m.name, m.layer] for m in found.modules]
    for text, weights_TE in zip(trace["weights"], found.weights_MTE, strict=True):
        read_TE = torch.tensor(unpacked(text, 3)) / 1000
        torch.testing.assert_close(read_TE, weights_TE, atol=5.01e-4, rtol=0)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_prompt_is_text(text: str, composition: Composition) -> None:
    """The page has the tags of one with a harmless prompt, and its data is what was said."""
    read = Read(render_page(hub.trace(composition, [text])))
    assert read.tags == Read(render_page(hub.trace(composition, ["harmless"]))).tags
    assert "".join(token[0] for token in read.trace["tokens"]) == text
    assert "<" not in read.scripts[0]


def test_nothing_is_loaded() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    read = Read(text)
    for tag, attributes in read.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys(), tag
    assert not re.search(r"https?:|//\w+\.|url\(|@import|fetch|XMLHttp|innerHTML|eval\(", text)
    (policy,) = [a["content"] for t, a in read.tags if t == "meta" and "http-equiv" in a]
    assert policy and policy.startswith("default-src 'none';") and "http" not in policy
    assert f'"{DIGITS}"' in text, "the page reads the letters that are written"


def test_packed_weights_are_thousandths() -> None:
    rows = [[0, 1.0, 0, 0.0004], [0, 1.0, 0, 0.0004], [0.25, 0.25, 0.2504, 0.2496], [0, 0, 0, 0]]
    rows += [[-1, 9.0, 0, 0]]
    text = pack_weights(torch.tensor(rows))
    assert text == "ABPo,=,AAD6ABD6ACD6ADD6,,AB__"
    assert unpacked(text, 4)[:4] == [[0, 1000, 0, 0]] * 2 + [[250] * 4, [0] * 4]
    assert unpacked(text, 4)[4] == [0, 4095, 0, 0]


def test_hundreds_of_experts_are_packed() -> None:
    torch.manual_seed(0)
    weights: Tensor = torch.zeros(20, 900).scatter(1, torch.randint(900, (20, 3)), 1 / 3)
    read = torch.tensor(unpacked(pack_weights(weights), 900))
    assert torch.equal(read, (weights * 1000).round().int())


def test_the_size_is_that_of_the_weights_that_are_not_zero() -> None:
    """512 tokens and 16 experts, of which each token takes two: 210 modules are about a megabyte."""
    torch.manual_seed(0)
    values, experts = torch.randn(512, 16).topk(2)
    weights = torch.zeros(512, 16).scatter(1, experts, values.softmax(-1))
    assert 210 * len(pack_weights(weights)) < 1_050_000
    assert 210 * len(pack_weights(torch.full((512, 16), 1 / 16))) < 250_000


def test_the_command_writes_and_opens_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: not opened.append(url))
    file = tmp_path / "new" / "trace.html"
    words = ("trace", recipe, "--prompt", HOSTILE[0], "--html", file)
    ran = run_hub(*words)
    assert ran.code == 0 and ran.lines("wrote") == [f"wrote {file}"] and not opened
    first = file.read_text(encoding="utf-8")
    assert "".join(token[0] for token in Read(first).trace["tokens"]) == HOSTILE[0]
    ran = run_hub(*words, "--open", "--json")
    assert ran.json["schema"] == 1 and opened == [file.as_uri()]
    assert file.read_text(encoding="utf-8") == first, "the same trace, the same page"
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert run_hub(*words, "--open").lines("note: ") == [
        f"note: no browser was found; open {file} in a browser"
    ]
