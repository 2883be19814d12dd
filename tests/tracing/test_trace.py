"""hub trace: the weights of every token, against their definition; the table, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, logits, make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.composition.generation import generate_ids, read_prompt
from experthub.hub.errors import UsageError
from experthub.hub.evaluation.routing_map import map_routing
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.tracing.tokens import build_tokens
from experthub.routing import record_routing
from safetensors.torch import load_file
from test_kinds import LABELS, MADE, png
from test_phatgoose import literal_model

Make = Callable[..., Path]
TARGETS = [LINEARS, LINEARS[:4], ("q_proj", "down_proj")]
TEXT = "Where do penguins live?"


@pytest.fixture
def folders(expert_folder: Make) -> list[Path]:
    return [
        expert_folder(e, rank=2 + e, targets=t, size=0.2, lora_alpha=3)
        for e, t in enumerate(TARGETS)
    ]


def recipe_of(folders: list[Path], base: Path, route: str = "{method: phatgoose}") -> Path:
    path = Path("recipe.yaml")
    path.write_text(f"base: {base}\nexperts: [{', '.join(map(str, folders))}]\nroute: {route}\n")
    return path


def literal_weights(base: Base, folders: list[Path], k: int, text: str) -> dict[str, Any]:
    """Module path -> softmax over the k largest LN(x) LN(gate)^T / sqrt(d), `[T, E]`, by the paper."""
    model = load_model(base, "float32", None)
    literal_model(model, folders, [3 / (2 + e) for e in range(len(folders))], k)
    gates = [load_file(folder / "phatgoose_gates.safetensors") for folder in folders]
    found = {}
    for name in sorted({n.removesuffix(".gate") for own in gates for n in own}):

        def weigh(_: Any, inputs: Any, name: str = name) -> None:
            x = inputs[0][0]
            d = x.shape[-1]
            here = [e for e, own in enumerate(gates) if f"{name}.gate" in own]
            rows = torch.zeros(len(x), len(gates))
            for t in range(len(x)):
                scores = {}
                for e in here:
                    g = gates[e][f"{name}.gate"]
                    pair = [(v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() for v in (x[t], g)]
                    scores[e] = float(pair[0] @ pair[1]) / math.sqrt(d)
                best = sorted(here, key=lambda e: -scores[e])[:k]
                total = sum(math.exp(scores[e]) for e in best)
                for e in best:
                    rows[t, e] = math.exp(scores[e]) / total
            found[name] = rows

        model.get_submodule(name).register_forward_pre_hook(weigh)
    with torch.no_grad():
        model(**load_tokenizer(base)(text, return_tensors="pt"))
    return found


def bits(weights: Any) -> float:
    return -sum(w * math.log2(w) for w in weights if w > 0)


def test_json_is_the_paper_by_token_module_and_layer(
    folders: list[Path], base_folder: Path, base: Base
) -> None:
    ran = run_hub("trace", recipe_of(folders, base_folder), "--prompt", TEXT, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    expected = literal_weights(base, folders, 2, TEXT)
    assert found["schema"] == 1 and found["entropy_unit"] == "bits" and found["left_out"] == []
    plan = hub.resolve(hub.Recipe.read("recipe.yaml"))
    assert found["composition"] == plan.digest
    assert found["experts"] == [{"label": e.label, "digest": e.digest} for e in plan.experts]
    assert [t["text"] for t in found["tokens"]] == list(TEXT)
    assert [t["id"] for t in found["tokens"]] == load_tokenizer(base)(TEXT)["input_ids"]
    assert [t["position"] for t in found["tokens"]] == list(range(len(TEXT)))
    assert {t["prompt"] for t in found["tokens"]} == {0}
    assert {m["name"] for m in found["modules"]} == set(expected)
    for module, weights in zip(found["modules"], found["weights"], strict=True):
        torch.testing.assert_close(
            torch.tensor(weights), expected[module["name"]], atol=2e-4, rtol=0
        )
        leaf = module["name"].rpartition(".")[2]
        assert module["experts"] == [e for e, names in enumerate(TARGETS) if leaf in names]
        assert f"model.layers.{module['layer']}." in module["name"]
    for layer in found["layers"]:
        own = [w for n, w in expected.items() if f".{layer['layer']}." in n]
        mean = torch.stack(own).mean((0, 1))
        assert layer["modules"] == len(own) == 7
        assert layer["weights"] == pytest.approx(mean.tolist(), abs=2e-4)
        entropy = sum(bits(row) for w in own for row in w.tolist()) / (len(own) * len(TEXT))
        usage = sum(bits(w.mean(0).tolist()) for w in own) / len(own)
        assert layer["entropy"] == pytest.approx(entropy, abs=1e-3)
        assert layer["usage_entropy"] == pytest.approx(usage, abs=1e-3)
        for name in ("entropy", "usage_entropy"):
            share = layer[name] / math.log2(3)
            assert layer[f"{name}_normalised"] == pytest.approx(share, abs=1e-5)


def test_the_table_shows_the_largest_means(folders: list[Path], base_folder: Path) -> None:
    path = recipe_of(folders, base_folder)
    words = ("trace", path, "--prompt", "ab", "--prompt", "c d")
    ran, found = run_hub(*words, "--top", "2"), run_hub(*words, "--json").json
    assert ran.code == 0, ran.err
    tokens, layers, notes = ran.out.split("\n\n")
    rows = [line.split() for line in tokens.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1:0", "1:1", "2:0", "2:1", "2:2"]
    assert '" "' in tokens.splitlines()[4]
    means = torch.tensor(found["weights"]).mean(0)
    for t in (0, 1, 2, 4):
        value, best = means[t].topk(2)
        labels = [found["experts"][int(e)]["label"] for e in best]
        expected = [labels[0], f"{value[0]:.2f}", labels[1], f"{value[1]:.2f}"]
        assert rows[t][2:] == expected
    head, *by_layer = [line.split() for line in layers.splitlines()]
    for line, layer in zip(by_layer, found["layers"], strict=True):
        at = {name: line[head.index(name)] for name in head[1:4]}
        assert at == {
            e["label"]: f"{w:.2f}" for e, w in zip(found["experts"], layer["weights"], strict=True)
        }
        assert line[4:6] == [f"{layer['entropy']:.2f}", f"{layer['entropy_normalised']:.2f}"]
    assert "in bits" in notes and "log2(3) = 1.58" in notes


def test_of_many_experts_the_table_has_the_largest_by_name(
    expert_folder: Make, base_folder: Path
) -> None:
    folders = [expert_folder(e, targets=("q_proj",), rank=1) for e in range(11)]
    path = recipe_of(folders, base_folder, "{method: uniform}")
    out = run_hub("trace", path, "--prompt", "x").out.split("\n\n")[1]
    head, first, _ = out.splitlines()
    assert "3 others" in head and first.split()[9] == f"{3 / 11:.2f}"


def state_of(model: Any) -> list[Any]:
    """Every module by identity, and every hook that it has."""
    return [
        (name, id(module), *map(dict, (module._forward_hooks, module._forward_pre_hooks)))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("method", ["phatgoose", "arrow", "smear, combine: outputs", "uniform"])
def test_tracing_leaves_nothing(method: str, folders: list[Path], base_folder: Path) -> None:
    composition = hub.compose(recipe_of(folders, base_folder, f"{{method: {method}}}"))
    before, expected = state_of(composition.model), logits(composition.model)
    hub.trace(composition, [TEXT], new_tokens=3)
    assert state_of(composition.model) == before
    assert torch.equal(logits(composition.model), expected)
    with record_routing(composition.model, 3) as found:
        assert torch.equal(logits(composition.model), expected), "while it is recorded, too"
        assert state_of(composition.model) != before
    assert len(found) == 14
    with pytest.raises(ZeroDivisionError), record_routing(composition.model, 3):
        raise ZeroDivisionError
    assert state_of(composition.model) == before


def test_a_recorded_module_weighs_as_it_mixes(folders: list[Path], base_folder: Path) -> None:
    """The recorded weights are those of the output: y - W x = sum_e w_e s_e B_e A_e x."""
    composition = hub.compose(recipe_of(folders, base_folder))
    name = "model.layers.1.mlp.down_proj"
    module = composition.model.get_submodule(name)
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda m, x, y: seen.append((x[0][0], y[0])))
    with record_routing(composition.model, 3, lambda path: path == name) as found:
        logits(composition.model)
    handle.remove()
    ((x, y),) = seen
    assert list(found) == [name]
    (weights,) = found[name]
    expected = module.base(x)
    for e in (0, 2):
        stored = load_file(folders[e] / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{name}.lora_{ab}.weight"] for ab in "AB")
        expected = expected + weights[:, e : e + 1] * 3 / (2 + e) * (x @ a.T @ b.T)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_written_is_traced(
    chat: bool, folders: list[Path], base_folder: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    composition = hub.compose(recipe_of(folders, base_folder))
    tokenizer = load_tokenizer(base)
    text = TEXT
    if chat:
        tokenizer.chat_template = "user: {{ messages[0].content }} you:"
        monkeypatch.setattr("experthub.hub.tracing.trace.load_tokenizer", lambda _: tokenizer)
        text = f"user: {TEXT} you:"
    ids = tokenizer(text)["input_ids"]
    new = generate_ids(composition, tokenizer, ids, 4)
    found = hub.trace(composition, [TEXT], new_tokens=4, chat=chat)
    assert [t.id for t in found.tokens] == ids + new
    assert [t.written for t in found.tokens] == [False] * len(ids) + [True] * 4
    with record_routing(composition.model, 3) as whole, torch.no_grad():
        composition.model(input_ids=torch.tensor([ids + new]))
    for module, weights in zip(found.modules, found.weights_MTE, strict=True):
        torch.testing.assert_close(weights, whole[module.name][0], atol=1e-4, rtol=1e-4)


def test_routers_by_example_decide_by_the_prompt(folders: list[Path], base_folder: Path) -> None:
    composition = hub.compose(recipe_of(folders, base_folder, "{method: smear, combine: outputs}"))
    prompt = hub.trace(composition, [TEXT])
    both = hub.trace(composition, [TEXT, "other words"], new_tokens=3)
    n = len(TEXT)
    assert len(both.tokens) == n + 3 + len("other words") + 3
    first, rest = both.weights_MTE[:, : n + 3], both.weights_MTE[:, n + 3 :]
    torch.testing.assert_close(first, prompt.weights_MTE[:, :1].expand_as(first))
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))
    assert not torch.allclose(first[:, 0], rest[:, 0])
    assert both.layers[0].entropy > 0


def test_routers_by_task_know_it(folders: list[Path], base_folder: Path, tiny_task: str) -> None:
    """A task of none of the experts: their mean, and nothing of them where that is said."""
    path = recipe_of(folders, base_folder, "{method: task}")
    words = ("trace", path, "--task", tiny_task, "--limit", "2", "--json", "--module", ".*q_proj")
    found = run_hub(*words).json
    assert {t["prompt"] for t in found["tokens"]} == {0, 1}
    assert found["weights"][0][0] == pytest.approx([1 / 3] * 3)
    label = found["experts"][1]["label"]
    composition = hub.compose(path)
    own = hub.trace(composition, ["a", "b"], modules=".*q_proj", tasks=[label, "none"])
    assert own.weights_MTE[0].tolist() == [pytest.approx([0, 1, 0]), pytest.approx([1 / 3] * 3)]


def test_every_prompt_needs_a_task_if_there_are_any(folders: list[Path], base_folder: Path) -> None:
    composition = hub.compose(recipe_of(folders, base_folder, "{method: task}"))
    for tasks in (["a"], ["a", "b", "c"]):
        with pytest.raises(UsageError, match=f"{len(tasks)} tasks were named for 2 prompts"):
            hub.trace(composition, ["a", "b"], tasks=tasks)
    with pytest.raises(UsageError, match="no prompts were given"):
        hub.trace(composition, [])


def test_a_chat_template_has_the_special_tokens_once(base: Base) -> None:
    from tokenizers import processors

    tokenizer = load_tokenizer(base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    for chat in (False, True):
        ids = read_prompt(base, tokenizer, "hi", chat)
        assert ids[0] == 256 and ids.count(256) == 1 and len(ids) == 3


def test_only_some_modules(folders: list[Path], base_folder: Path) -> None:
    path = recipe_of(folders, base_folder)
    found = run_hub("trace", path, "-p", "ab", "--json", "--module", r".*\.1\..*[qv]_proj").json
    assert [m["name"].rpartition(".")[2] for m in found["modules"]] == ["q_proj", "v_proj"]
    assert [layer["layer"] for layer in found["layers"]] == [1]
    whole = run_hub("trace", path, "-p", "ab", "--json").json
    names = [m["name"] for m in whole["modules"]]
    for module, weights in zip(found["modules"], found["weights"], strict=True):
        assert weights == whole["weights"][names.index(module["name"])]


def test_the_routed_parts_are_traced(folders: list[Path], base_folder: Path) -> None:
    path = recipe_of(folders, base_folder)
    ways = {
        ".*mlp.*": "merge: {method: linear}",
        ".*q_proj": "route: {method: arrow}",
        ".*k_proj": "route: {method: uniform}",
    }
    parts = "".join(f"  - {{targets: '{targets}', {way}}}\n" for targets, way in ways.items())
    path.write_text(path.read_text().partition("route:")[0] + "parts:\n" + parts)
    found = run_hub("trace", path, "-p", "ab", "--json").json
    assert found["methods"] == ["arrow", "uniform"]
    by_name = {m["name"]: w for m, w in zip(found["modules"], found["weights"], strict=True)}
    layers = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert set(by_name) == {f"{at}.{leaf}" for at in layers for leaf in ("q_proj", "k_proj")}
    assert by_name[f"{layers[0]}.k_proj"] == [pytest.approx([1 / 3, 1 / 3, 0], abs=1e-6)] * 2
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in by_name[f"{layers[1]}.q_proj"])


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "encoder")
    experts = [
        make_expert(tmp_path / f"e{e}", folder, e, targets=("query", "dense"), size=0.1)
        for e in range(2)
    ]
    path = recipe_of(experts, folder)
    ran = run_hub("trace", path, "-p", "fire", "-p", "deep sea", "--json")
    assert ran.json["left_out"] == ["pooler.dense"]
    assert ran.lines("note: ") == [
        "note: pooler.dense does not read every token once, and is omitted"
    ]
    assert len(ran.json["tokens"]) == len("firedeep sea") and len(ran.json["modules"]) == 8
    long = run_hub("trace", path, "-p", "x" * 600, "--json")
    assert len(long.json["tokens"]) == 512
    (note,) = long.lines("note: the text")
    assert "has 600 tokens" in note and "reads at most 512" in note
    ran = run_hub("trace", path, "-p", "x", "--generate", "2")
    assert ran.code == 2 and "cannot generate" in ran.err
    ran = run_hub("trace", path, "-p", "ab", "--module", "pooler.*")
    assert ran.code == 2 and "no routed module reads every token once: pooler.dense" in ran.err


def test_a_text_classifier_is_traced(tmp_path: Path) -> None:
    MADE["text"](tmp_path / "base")
    expert = make_expert(tmp_path / "e", tmp_path / "base", 1, targets=("query", "classifier"))
    found = run_hub("trace", recipe_of([expert], tmp_path / "base"), "-p", "abc", "--json").json
    assert found["left_out"] == ["classifier"] and len(found["modules"]) == 2
    assert found["weights"] == [[[1.0]] * 3] * 2
    assert found["layers"][0]["entropy_normalised"] == 0


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("clip", "q_proj", "CLIPModel"),
        ("image", ("q_proj", "query", "attention.query"), "ViTForImageClassification"),
        ("seq2seq", "q", "T5ForConditionalGeneration"),
    ],
)
def test_what_reads_no_text_alone_is_refused(
    kind: str, target: Any, name: str, tmp_path: Path
) -> None:
    MADE[kind](tmp_path / "base")
    targets = (target,) if isinstance(target, str) else target
    expert = make_expert(tmp_path / "e", tmp_path / "base", 1, targets=targets)
    ran = run_hub("trace", recipe_of([expert], tmp_path / "base", "{method: uniform}"), "-p", "x")
    assert (ran.code, ran.out) == (2, "")
    assert f"is a {name}, which does not read text alone" in ran.err
    assert "loading" not in ran.err, "it is refused before a weight is read"


def test_scores_of_images_come_without_a_routing_map(tmp_path: Path) -> None:
    MADE["clip"](tmp_path / "base")
    expert = make_expert(tmp_path / "e", tmp_path / "base", 1, targets=("q_proj",))
    examples = []
    for n in range(6):
        text = png(n % 3, n)
        examples.append(Example(id=example_id(text, LABELS), input=text, targets=[LABELS[n % 3]]))
    card = Card(name="colours", source="made-up", kind="labels", labels=LABELS)
    task = write_task("local", card, examples)
    path = recipe_of([expert], tmp_path / "base", "{method: uniform}")
    ran = run_hub("eval", path, "--tasks", task, "--split", "all", "--plots", "out")
    assert ran.code == 0 and "recipe" in ran.out, ran.err
    assert len(ran.lines("cannot draw out/recipe-routing.png: ")) == 1
    assert [file.name for file in Path("out").iterdir()] == ["table.png"]


def test_a_merge_is_refused_before_it_is_loaded(folders: list[Path], base_folder: Path) -> None:
    path = recipe_of(folders, base_folder)
    path.write_text(path.read_text().replace("route: {method: phatgoose}", "merge: {method: ties}"))
    ran = run_hub("trace", path, "--prompt", "x")
    assert (ran.code, ran.out) == (2, "")
    assert ran.lines("error") == ["error: ties: a merge has no routing to trace"]
    assert ran.lines("hint") and "loading" not in ran.err
    with pytest.raises(UsageError, match="ties: a merge has no routing"):
        map_routing(path, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no text to trace was given"),
        (("-p", "x", "--task", "local:parity"), "--prompt and --task exclude each other"),
        (("-p", ""), "prompt 1 is empty"),
        (("-p", "x", "-p", "x" * 513, "--long", "refuse"), "... has 513 tokens"),
        (("-p", "x" * 500, "--generate", "20", "--long", "refuse"), "... has 520 tokens"),
        (("-p", "x", "--generate", "512"), "512 tokens are to follow a text"),
        (("-p", "x", "--long", "drop"), "unknown rule for long texts 'drop'"),
        (("-p", "x", "--module", "nothing"), "no routed module matches 'nothing'"),
        (("-p", "x", "--module", "(q"), "is not a regular expression"),
        (("-p", "x", "--module", "(.*)*(.*)*(.*)*(.*)*(.*)*x!"), "matching takes too long"),
        (("-p", "x", "--open"), "--open needs the page that --html writes"),
        (("-p", "x", "--html", "."), ". is not a file"),
        (("-p", "x", "--chat"), "has no chat template"),
        (("-p", "x", "--top", "0"), "invalid value for '--top'"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], said: str, folders: list[Path], base_folder: Path
) -> None:
    ran = run_hub("trace", recipe_of(folders, base_folder), *words)
    assert (ran.code, ran.out) == (2, "")
    (error,) = ran.lines("error: ")
    assert said in error and ran.lines("hint: ")


@pytest.mark.parametrize("text", ["plain", "Zürich 🌧 and 日本", "🌧", "\ufffd!", "a\n\n\tb"])
def test_the_pieces_are_the_text(text: str, base: Base) -> None:
    """The last of several tokens that form a character has all of it."""
    tokenizer = load_tokenizer(base)
    ids = tokenizer(text)["input_ids"]
    found = build_tokens(tokenizer, ids[:2], ids[2:], 0)
    assert len(found) == len(text.encode())
    assert "".join(token.text for token in found) == text
    if "\ufffd" not in text:
        assert [token.text for token in found if token.text] == list(text)
    cut = build_tokens(tokenizer, tokenizer("a🌧")["input_ids"][:-1], [], 0)
    assert [token.text for token in cut] == ["a", "", "", "\ufffd"]
