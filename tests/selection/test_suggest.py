"""hub suggest: every measure against its literal definition, and what is made of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.errors import HubError, UsageError
from experthub.hub.evaluation.statistics import kendall, spearman
from experthub.hub.files.atomic import hub_home
from experthub.hub.formats.adapter import ADAPTER, GATES
from experthub.hub.registry.expert import Reference
from experthub.hub.selection.measuring import suggest
from experthub.hub.selection.suggestion import Suggestion, write_suggestion
from experthub.hub.selection.tmi import estimate_conditional_entropy
from experthub.hub.session import Session
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task
from experthub.hub.training.fit import Settings
from experthub.hub.training.train import train_gate, train_lora
from safetensors.torch import load_file, save_file

WORDS = {"animals": "cat dog cow hen", "colours": "RED BLUE GREEN PINK", "signs": "!!! ??? ###"}
SELECTION = Path(__file__).parents[2] / "docs" / "selection.md"
ENCODER_LINEARS = ("query", "key", "value", "dense")


def made_task(name: str, words: str, turned: bool = False, count: int = 60) -> str:
    """Make a task that asks which of two words comes first; `turned` makes some answers wrong."""
    listed, choices = words.split(), ["yes", "no"]
    examples = []
    for n in range(count):
        text = f"{listed[n % len(listed)]} {listed[n * 7 % len(listed)]} {n}"
        right = (n % len(listed) == 0) != (turned and n % 3 == 0)
        example = Example(
            id=example_id(text, choices), input=text, choices=choices, answer=int(right)
        )
        examples.append(example)
    return write_task("made", Card(name=name, source="made-up", template="{input} ="), examples)


def examples_of(task: str) -> Path:
    return hub_home() / "tasks" / task.replace(":", "/") / "examples.jsonl"


def left_with(task: str, parts: set[str]) -> int:
    """Take all examples but those of some splits out of a task; how many are left."""
    lines = examples_of(task).read_text().splitlines(keepends=True)
    left = [line for line in lines if Example.model_validate_json(line).part in parts]
    examples_of(task).write_text("".join(left))
    return len(left)


@pytest.fixture
def pool(base_folder: Path, expert_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Three registered experts of the tiny model, the last for attention only; a tiny encoder."""
    tiny_bert(tmp_path / "encoder")
    folders, tasks = [], []
    for seed, (name, words) in enumerate(WORDS.items()):
        tasks.append(made_task(name, words))
        targets = {"targets": ("q_proj", "o_proj")} if seed == 2 else {}
        folders.append(expert_folder(seed, rank=2 + seed, **targets))
        where = ("--base", base_folder, "--task", tasks[-1])
        added = run_hub("add", folders[-1], "--name", f"expert-{seed}", *where)
        assert added.code == 0, added.err
    made = {"base": str(base_folder), "embedder": str(tmp_path / "encoder")}
    return {**made, "folders": folders, "tasks": tasks}


def ranked(pool: dict[str, Any], task: str, **options: Any) -> Suggestion:
    return suggest(task, base=pool["base"], embedder=pool["embedder"], **options)


def texts_of(task: str, count: int) -> list[str]:
    read = read_task(task)
    return [read.format_prompt(example) for example in read.split("train", count)]


def inputs_of(folder: str, texts: list[str]) -> dict[str, torch.Tensor]:
    """Every linear module's inputs `[T, I]`, one text after the other, without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs: found.setdefault(name, []).append(inputs[0][0])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    return {name: torch.cat(rows) for name, rows in found.items()}


def literal_affinity(
    pool: dict[str, Any], texts: list[str], score: Callable[..., torch.Tensor]
) -> list[float]:
    """Mean softmax weight, times the number of experts at the module; mean over modules."""
    found: list[list[float]] = [[] for _ in pool["folders"]]
    adapters = [load_file(folder / ADAPTER) for folder in pool["folders"]]
    gates = [load_file(folder / GATES) for folder in pool["folders"]]
    for name, x_TI in inputs_of(pool["base"], texts).items():
        here = [e for e in range(3) if f"{name}.gate" in gates[e]]
        if not here:
            continue
        key = f"base_model.model.{name}"
        columns = []
        for e in here:
            a, b = (adapters[e][f"{key}.lora_{factor}.weight"] for factor in "AB")
            columns.append(torch.stack([score(x, b @ a, gates[e][f"{name}.gate"]) for x in x_TI]))
        weights_TE = torch.stack(columns, -1).softmax(-1)
        for place, e in enumerate(here):
            found[e].append(float(weights_TE[:, place].mean()) * len(here))
    return [sum(own) / len(own) for own in found]


def phatgoose_score(x: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    norm = torch.nn.functional.layer_norm
    return norm(x, x.shape) @ norm(gate, gate.shape) / math.sqrt(len(x))


def arrow_score(x: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x @ torch.linalg.svd(delta).Vh[0]).abs()


@pytest.mark.parametrize(
    ("measure", "score"), [("gates", phatgoose_score), ("prototypes", arrow_score)]
)
def test_affinities_are_mean_routing_weights(
    pool: dict[str, Any], measure: Any, score: Callable[..., torch.Tensor]
) -> None:
    found = ranked(pool, pool["tasks"][1], by=measure, examples=7, relative=False)
    assert found.examples == 7 and not found.relative
    expected = literal_affinity(pool, texts_of(pool["tasks"][1], 7), score)
    assert found.scores == {measure: pytest.approx(expected, abs=1e-4)}
    assert len(set(expected)) == 3

    found = ranked(pool, pool["tasks"][1], by=measure, examples=7)
    others = [literal_affinity(pool, texts_of(pool["tasks"][t], 7), score) for t in (0, 2)]
    usual = [math.sqrt(a * b) for a, b in zip(*others, strict=True)]
    divided = [e / u for e, u in zip(expected, usual, strict=True)]
    assert found.relative and found.record()["relative"] is True
    assert found.scores == {measure: pytest.approx(divided, abs=1e-4)}


def test_without_other_tasks_weights_are_not_relative(
    pool: dict[str, Any], expert_folder: Callable[..., Path]
) -> None:
    """The only task that an expert was trained on is the one asked for; a folder names none."""
    given: dict[str, Any] = {"base": pool["base"], "embedder": pool["embedder"], "examples": 5}
    names = ["expert-0", str(expert_folder(7))]
    found = suggest(pool["tasks"][0], names, **given)
    assert not found.relative and found.rank_by == "embeddings"
    absolute = suggest(pool["tasks"][0], names, **given, relative=False)
    assert found.scores == absolute.scores
    other = suggest(pool["tasks"][1], names, **given)
    assert other.relative and other.rank_by == "prototypes"


def test_many_tasks_are_read_by_few_texts_each(
    pool: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experthub.hub.selection.measuring.OTHERS", 5)
    given: dict[str, Any] = {"by": "gates", "rank_by": "gates"}
    few = ranked(pool, pool["tasks"][1], **given, examples=9).scores["gates"]
    usual = [
        ranked(pool, pool["tasks"][t], **given, examples=2, relative=False).scores["gates"]
        for t in (0, 2)
    ]
    raw = ranked(pool, pool["tasks"][1], **given, examples=9, relative=False).scores["gates"]
    assert few == pytest.approx(
        [r / math.sqrt(a * b) for r, a, b in zip(raw, *usual, strict=True)], rel=1e-5
    )


def unit(pool: dict[str, Any], text: str) -> torch.Tensor:
    """One text's embedding, alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pool["embedder"])
    model = transformers.AutoModel.from_pretrained(pool["embedder"]).eval()
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def test_embeddings_are_cosines_of_mean_embeddings(pool: dict[str, Any]) -> None:
    def mean(task: str) -> torch.Tensor:
        return torch.stack([unit(pool, text) for text in texts_of(task, 5)]).mean(0)

    found = ranked(pool, pool["tasks"][0], by="embeddings", examples=5).scores["embeddings"]
    here = mean(pool["tasks"][0])
    cosine = torch.nn.functional.cosine_similarity
    expected = [float(cosine(mean(task), here, 0)) for task in pool["tasks"]]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(1)


def literal_entropy(rows: list[list[float]], labels: list[str], k: int) -> float:
    """Kozachenko and Leonenko's estimate for every class, in loops over points and dimensions."""
    total, seen = 0.0, 0
    for label in set(labels):
        own = [row for row, other in zip(rows, labels, strict=True) if other == label]
        if len(own) <= k:
            continue
        logs = []
        for i, x in enumerate(own):
            others = [
                max(abs(a - b) for a, b in zip(x, y, strict=True))
                for j, y in enumerate(own)
                if j != i
            ]
            logs.append(math.log(2 * sorted(others)[k - 1]))
        harmonic = sum(1 / n for n in range(k, len(own)))  # digamma(n) - digamma(k)
        total += len(own) * (harmonic + len(rows[0]) * sum(logs) / len(logs))
        seen += len(own)
    return total / seen


def test_conditional_entropy_is_that_of_the_literal_estimate() -> None:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    labels = ["a"] * 12 + ["b"] * 15 + ["rare"] * 3
    expected = literal_entropy(rows.tolist(), labels, 3)
    assert estimate_conditional_entropy(rows, labels) == pytest.approx(expected, rel=1e-5)
    wide = estimate_conditional_entropy(2 * rows, labels)
    assert wide - estimate_conditional_entropy(rows, labels) == pytest.approx(
        6 * math.log(2), rel=1e-4
    )
    with pytest.raises(ValueError, match="found none"):
        estimate_conditional_entropy(rows, [str(n) for n in range(30)])


def test_tmi_is_the_entropy_of_composed_features(pool: dict[str, Any]) -> None:
    """The features are the states of the last prompt token, with each expert merged in."""
    task = read_task(pool["tasks"][0])
    examples = task.split("train", 20)
    found = ranked(pool, task.reference, by="tmi", labels=True, examples=20).scores["tmi"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(pool["base"])
    for number, score in enumerate(found):
        recipe = {"base": pool["base"], "experts": [f"expert-{number}"]}
        model = hub.compose({**recipe, "merge": {"method": "linear"}}).model
        rows = []
        with torch.no_grad():
            for example in examples:
                ids = tokenizer(task.format_prompt(example), return_tensors="pt")["input_ids"]
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
                rows.append(states[-1][0, -1].tolist())
        labels = [task.format_answer(example) for example in examples]
        assert score == pytest.approx(literal_entropy(rows, labels, 3), rel=1e-3)


def test_labels_reach_tmi_and_nothing_else(pool: dict[str, Any]) -> None:
    """The same inputs with other answers: only tmi is another."""
    right, wrong = made_task("right", "x y z"), made_task("wrong", "x y z", turned=True)
    assert texts_of(right, 30) == texts_of(wrong, 30)
    a, b = (ranked(pool, task, labels=True, examples=30) for task in (right, wrong))
    assert set(a.scores) == {"gates", "prototypes", "embeddings", "tmi"}
    assert {m: s for m, s in a.scores.items() if m != "tmi"} == {
        m: s for m, s in b.scores.items() if m != "tmi"
    }
    assert all(x != y for x, y in zip(a.scores["tmi"], b.scores["tmi"], strict=True))
    unlabelled = ranked(pool, right, examples=30)
    assert unlabelled.scores == {m: s for m, s in a.scores.items() if m != "tmi"}


def test_the_same_again(pool: dict[str, Any]) -> None:
    once, again = (
        ranked(pool, pool["tasks"][2], labels=True, examples=20).record() for _ in range(2)
    )
    assert once == again


@pytest.mark.slow
def test_the_expert_of_the_task_comes_first(base_folder: Path, tmp_path: Path) -> None:
    """Trained experts with trained gates: by gates, by embeddings, and by what they do."""
    tiny_bert(tmp_path / "encoder")
    for name, words in WORDS.items():
        task = made_task(name, words, count=160)
        train_lora(str(base_folder), task, name, Settings(30, batch_size=8, lr=1e-2))
        train_gate(name, Settings(20, batch_size=8, lr=5e-2))
    for name in WORDS:
        found = suggest(
            f"made:{name}",
            base=str(base_folder),
            truth=True,
            examples=16,
            embedder=str(tmp_path / "encoder"),
        )
        place = found.references.index(f"{name}@2")
        for measure in ("gates", "embeddings"):
            assert found.compute_ranks(measure)[place] == 1, (name, measure)
        assert found.truth["logprob"][place] == max(found.truth["logprob"])
        assert found.select_best(1) == [f"{name}@2"]
        assert found.compute_correlations()["gates"]["logprob"]["n"] == 3


def test_rank_correlations_are_the_textbook_ones() -> None:
    xs, ys = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    assert spearman(xs, ys) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert kendall(xs, ys) == pytest.approx((8 - 2) / 10)
    assert spearman(xs, [-y for y in ys]) == pytest.approx(-0.8)
    tied = [1.0, 1.0, 2.0, 3.0]
    # ranks 1.5 1.5 3 4 against 1 2 3 4; of six pairs, five are in order and one is tied
    assert spearman(tied, xs[:4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert kendall(tied, xs[:4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None and kendall([1.0, 1.0], [1.0, 2.0]) is None


@pytest.mark.parametrize("method", [None, "phatgoose", "arrow", "uniform", "ties"])
def test_written_recipes_compose(pool: dict[str, Any], method: str | None, tmp_path: Path) -> None:
    found = ranked(pool, pool["tasks"][0], by="gates", k=2)
    path = tmp_path / "new" / "recipe.yaml"
    plan = write_suggestion(found, 2, path, Session(), method)
    assert [member.reference for member in plan.members] == found.select_best(2)
    assert plan.recipe.method.method == (method or "phatgoose")
    composition = hub.compose(path)
    assert composition.plan.digest == plan.digest
    with torch.no_grad():
        assert torch.isfinite(composition.model(input_ids=torch.tensor([[5, 9]])).logits).all()


def test_folders_are_written_relative_to_the_recipe(
    pool: dict[str, Any], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_expert(tmp_path / "project" / "mine", base_folder, 7, gates=False)
    monkeypatch.chdir(tmp_path / "project")
    out = tmp_path / "project" / "recipe.yaml"
    arguments = ["--base", base_folder, "--task", pool["tasks"][0], "--by", "prototypes"]
    ran = run_hub("suggest", "./mine", pool["folders"][0], *arguments, "--out", out)
    assert ran.code == 0, ran.err
    text = out.read_text()
    assert "- ./mine\n" in text and f"- {pool['folders'][0]}\n" in text
    assert "method: arrow" in text  # gates are missing
    monkeypatch.chdir(tmp_path)
    assert {e.label for e in hub.resolve(hub.Recipe.read(out)).experts} == {"mine", "expert-1"}


def shape(value: Any) -> Any:
    """The keys of plain values, without the values."""
    return {key: shape(own) for key, own in value.items()} if isinstance(value, dict) else None


def test_the_command(pool: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    common = ["--base", pool["base"], "--task", pool["tasks"][1], "--embedder", pool["embedder"]]
    ran = run_hub(
        "suggest", *common, "--labels", "--truth", "--k", "2", "--rank-by", "gates", "--json",
        "--examples", "20", "--out", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["schema"] == 1 and found["rank_by"] == "gates" and found["examples"] == 20
    assert found["base"] == pool["base"] and found["labels"] is True
    assert [row["ranks"]["gates"] for row in found["experts"]] == [1, 2, 3]
    assert found["best"] == [row["expert"] for row in found["experts"][:2]]
    assert set(found["experts"][0]["truth"]) == {"accuracy", "logprob"}
    assert found["truth_n"] == len(read_task(pool["tasks"][1]).split("test"))
    kinds = found["correlations"]["tmi"]
    assert set(kinds) == {"accuracy", "logprob"} and kinds["logprob"]["n"] == 3
    assert -1 <= kinds["logprob"]["spearman"] <= 1
    (documented,) = re.findall(r"```json\n(.*?)```", SELECTION.read_text(), re.DOTALL)
    shown = json.loads(documented)
    assert list(shown) == list(found)
    assert shape(shown["experts"][0]) == shape(found["experts"][0])
    assert shape(shown["correlations"]["gates"]) == shape(found["correlations"]["gates"])
    again = run_hub("suggest", *common, "--by", "gates", "--out", out)
    assert again.code == 6 and "--force" in again.err
    table = run_hub("suggest", *common, "--by", "gates", "--out", out, "--force")
    assert table.code == 0 and "ordered by gates" in table.out
    assert [line.split()[0] for line in table.out.splitlines()[1:4]] == [
        row["expert"] for row in found["experts"]
    ]


def test_what_is_missing_is_left_out_or_refused(
    pool: dict[str, Any], expert_folder: Callable[..., Path], base_folder: Path
) -> None:
    folder = expert_folder(9, gates=False)
    added = run_hub("add", folder, "--name", "bare", "--base", base_folder)
    assert added.code == 0, added.err
    said: list[str] = []
    session = Session(report=lambda what, done, size: said.append(what))
    found = ranked(pool, pool["tasks"][0], examples=8, session=session)
    place = found.references.index("bare@1")
    assert found.scores["gates"][place] is None is found.scores["embeddings"][place]
    assert found.scores["prototypes"][place] is not None
    assert found.rank_by == "prototypes" and len(found.select_best(4)) == 4
    found = replace(found, rank_by="gates")
    assert found.compute_ranks("gates")[place] is None and place not in found.order
    assert found.record()["experts"][-1]["expert"] == "bare@1"
    with pytest.raises(UsageError, match="only 3 experts have a score"):
        found.select_best(4)
    assert len(found.select_best()) == 3
    with pytest.raises(HubError, match="has no gate for"):
        write_suggestion(
            ranked(pool, pool["tasks"][0], by="prototypes"),
            4,
            Path("x.yaml"),
            Session(),
            "phatgoose",
        )
    assert not Path("x.yaml").exists()
    only = suggest(pool["tasks"][0], ["bare"], examples=8, embedder=pool["embedder"])
    assert list(only.scores) == ["prototypes"]
    with pytest.raises(HubError, match="has a score by gates"):
        suggest(pool["tasks"][0], ["bare"], by="gates")


def test_a_dense_expert_has_neither_gates_nor_a_prototype(
    pool: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "dense").mkdir()
    names = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
    tensors = {n: 0.1 * torch.randn(32, 32) if "q_proj" in n else torch.randn(32) for n in names}
    save_file(tensors, tmp_path / "dense" / "task_vector.safetensors")
    where = ("--base", base_folder, "--task", pool["tasks"][0])
    added = run_hub("add", tmp_path / "dense", "--name", "dense", *where)
    assert added.code == 0, added.err
    found = suggest(
        pool["tasks"][0],
        ["dense", "expert-1"],
        labels=True,
        examples=20,
        embedder=pool["embedder"],
    )
    assert found.scores["gates"][0] is None is found.scores["prototypes"][0]
    assert found.scores["gates"][1] is not None and None not in found.scores["tmi"]
    assert found.select_best(2) == ["dense@1", "expert-1@1"]
    assert write_suggestion(found, 2, "recipe.yaml", Session()).recipe.method.method == "linear"
    with torch.no_grad():
        model = hub.compose("recipe.yaml").model
        assert torch.isfinite(model(input_ids=torch.tensor([[5, 9]])).logits).all()


def test_errors(pool: dict[str, Any], tmp_path: Path) -> None:
    task, base = pool["tasks"][0], ("--base", pool["base"])
    lonely = tmp_path / "lonely"
    tiny_bert(lonely)
    untested = made_task("untested", "x y z")
    left = left_with(untested, {"train"})
    cases: list[tuple[list[str], int, str]] = [
        (["--task", "made:nowhere", *base], 4, "there is no task made:nowhere"),
        (["--task", task, "--base", str(lonely)], 4, "no registry has an expert of"),
        (["--task", task, *base, "--k", "4"], 2, "there are only 3 experts"),
        (["--task", task, *base, "--by", "tmi"], 2, "--labels"),
        (["--task", task, *base, "--rank-by", "tmi"], 2, "--labels"),
        (["--task", task, *base, "--by", "gates", "--rank-by", "prototypes"], 2, "--by gates"),
        (["--task", task, *base, "--rank-by", "all"], 2, "needs one measure, not all"),
        (["--task", task, *base, "--by", "gates", "--rank-by", "all"], 2, "needs one measure"),
        (["--task", task, *base, "--by", "gate"], 2, "unknown measure 'gate'"),
        (["--task", task, *base, "--method", "phatgose"], 2, "did you mean"),
        (["--task", task], 2, "pass a base with --base"),
        (["--task", task, "nobody"], 4, "nobody"),
        (["--task", task, *base, "--embedder", pool["base"]], 2, "is not a sentence encoder"),
        (["--task", task, "--base", "nobody"], 4, "no registry has a base named 'nobody'"),
        (["--task", task, *base, "--out", str(tmp_path), "--force"], 2, "is not a file"),
        (["--task", task, *base, "--out", f"{lonely}/config.json/x.yaml"], 2, "is not a folder"),
        (["--task", task, *base, "--truth", "--split", "all"], 2, "was trained on"),
        (["--task", untested, *base, "--truth"], 1, f"it has {left} in all: {left} train"),
    ]
    for arguments, code, words in cases:
        ran = run_hub("suggest", *arguments)
        assert (ran.code, words in ran.err) == (code, True), (arguments, ran.err)
        assert len(ran.lines("error:")) == 1 == len(ran.lines("hint:")), (arguments, ran.err)
        assert "loading the base" not in ran.err or "encoder" in ran.err, (arguments, ran.err)


def test_an_expert_is_compared_once(pool: dict[str, Any]) -> None:
    names = ["expert-1", "expert-1@1", "expert-0"]
    found = suggest(pool["tasks"][0], names, by="prototypes", examples=4)
    assert found.references == ["expert-1@1", "expert-0@1"]


def test_the_base_is_that_of_the_experts_by_any_of_its_names(
    pool: dict[str, Any], tmp_path: Path
) -> None:
    """One expert says what the base is also known as, one is a folder that says nothing."""
    entry = hub.Registry.read().find_expert(Reference.parse("expert-0")).model_dump(mode="json")
    bases = {"tiny": {"sources": [f"file:{pool['base']}"], "aka": ["org/tiny"]}}
    experts = [
        {**entry, "name": name, "base": base}
        for name, base in (("one", "tiny"), ("two", "org/tiny"))
    ]
    file = tmp_path / "registry.yaml"
    file.write_text(json.dumps({"version": 1, "bases": bases, "experts": experts}))
    session = Session(hub.Registry.read(file))
    options: dict[str, Any] = {"by": "prototypes", "examples": 4, "session": session}
    for base in ("tiny", "org/tiny"):
        all_of = suggest(pool["tasks"][0], base=base, **options)
        assert all_of.references == ["one@1", "two@1"]
    named = suggest(pool["tasks"][0], ["one", "two", str(pool["folders"][1])], **options)
    assert len(named.references) == 3 and named.plan.base.name == "tiny"
    with pytest.raises(UsageError, match="no known base"):
        suggest(pool["tasks"][0], [str(pool["folders"][1])], **options)


def test_experts_whose_tasks_show_nothing_have_no_embedding(pool: dict[str, Any]) -> None:
    """One task has no training examples, one is damaged."""
    said: list[str] = []
    left_with(pool["tasks"][0], {"validation", "test"})
    examples_of(pool["tasks"][1]).write_text("{")
    session = Session(report=lambda what, done, size: said.append(what))
    found = ranked(pool, pool["tasks"][2], session=session)
    assert [score is None for score in found.scores["embeddings"]] == [True, True, False]
    assert None not in found.scores["gates"] and found.select_best() == ["expert-2@1"]
    for words in ("has no train examples", "line 1: "):
        assert any("note:" in what and words in what for what in said), (words, said)


def test_classes_that_are_too_small(pool: dict[str, Any]) -> None:
    said: list[str] = []
    session = Session(report=lambda what, done, size: said.append(what))
    found = ranked(pool, pool["tasks"][0], labels=True, examples=3, session=session)
    assert "tmi" not in found.scores
    assert any("no answer has 4 of 3 examples" in what for what in said)


def test_an_encoder(tmp_path: Path) -> None:
    """An encoder uses pooled embeddings instead of last tokens, and is its own embedder."""
    base = tiny_bert(tmp_path / "encoder")
    task = made_task("animals", WORDS["animals"])
    for seed in range(2):
        folder = make_expert(tmp_path / f"e{seed}", base, seed, targets=ENCODER_LINEARS)
        added = run_hub("add", folder, "--name", f"e{seed}", "--base", base, "--task", task)
        assert added.code == 0, added.err
    out = tmp_path / "recipe.yaml"
    common = ("--task", task, "--base", base, "--embedder", base)
    ran = run_hub("suggest", *common, "--labels", "--truth", "--json", "--out", out)
    assert ran.code == 0, ran.err
    assert set(ran.json["correlations"]) == {"gates", "prototypes", "embeddings", "tmi"}
    assert hub.Recipe.read(out).method.method == "phatgoose"
    assert json.loads(ran.out)["experts"][0]["scores"]["embeddings"] == pytest.approx(1)
