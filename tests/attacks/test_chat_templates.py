"""Chat templates that loop, allocate or write without an end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition import chat_template
from experthub.hub.composition.generation import read_prompt
from experthub.hub.errors import HubError

pytestmark = pytest.mark.attack
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
TEMPLATES = {
    "nested loops": (LOOP, 3),
    "one large text": ("{{ 'a' * 100000000000 }}", 3),
    "a text that doubles": (DOUBLE, 3),
    "a long result": ("{{ 'a' * 2000000 }}", 3),
    "a large number": ("{{ 10 ** (10 ** 8) }}", 3),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 1),
    "many loops in a macro": (
        "{% macro f(n) %}{% for i in range(9) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}"
        "{% endmacro %}{{ f(40) }}",
        3,
    ),
    "a refusal": ("{{ raise_exception('no') }}", 1),
    "an error": ("{{ messages[7].content.x }}", 1),
    "no template": ("{% for %}", 1),
    "the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 1),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("what", TEMPLATES)
def test_templates_end(what: str, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template, code = TEMPLATES[what]
    with pytest.raises(HubError) as caught:
        read_prompt(base, tokenizer, "x", chat=True)
    assert caught.value.code == code, caught.value.message
    assert "chat template" in caught.value.message and len(caught.value.message) < 600


def test_a_template_renders_as_transformers_renders_it(base: Base) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} {{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = " ä \U0001f600 {{ 1 }} \n"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert chat_template.render_chat(base, tokenizer, prompt) == text


def test_code_in_the_current_folder_is_not_run(base: Base) -> None:
    for name in ("json", "resource", "transformers", "jinja2"):
        Path(f"{name}.py").write_text("open('ran', 'w').close()")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat_template.render_chat(base, tokenizer, json.dumps({"a": 1})) == '{"a": 1}'
    assert not Path("ran").exists()
