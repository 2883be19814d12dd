"""Write the recipes whose results are frozen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

THREE = ["one", "two", "three"]
UNEQUAL = ["one", {"expert": "low", "weight": 2}, {"expert": "patterned", "weight": 0.5}]
DENSE = ["full", {"expert": "sparse", "weight": 0.5}, "one"]
TASKS = ["made:animals", "made:colours", "made:numbers"]
LABELLED = {"tasks": TASKS[:2], "labels": True, "limit": 8}
UNLABELLED = {"tasks": TASKS[:2], "limit": 8}
OWN = {"tasks": TASKS, "limit": 6}
FEW = {"steps": 3, "batch_size": 4}
ENCODED = {"examples": 6, "embedder": "encoder"}

Recipe = dict[str, Any]


def of(
    base: str = "llama", experts: list[Any] = THREE, more: Recipe | None = None, **keys: Any
) -> Recipe:
    """Return a recipe; keys are those of a recipe, and `more` those that are no Python names."""
    return {"base": base, "experts": experts, **keys, **(more or {})}


def merge(
    method: str, *, experts: list[Any] = THREE, base: str = "llama", **options: Any
) -> Recipe:
    """Return a recipe of a merge; `data`, `dtype` and the like are keys of the recipe."""
    return _with("merge", method, base, experts, options)


def route(
    method: str, *, experts: list[Any] = THREE, base: str = "llama", **options: Any
) -> Recipe:
    """Return a recipe of a route; `data`, `dtype` and the like are keys of the recipe."""
    return _with("route", method, base, experts, options)


def _with(kind: str, method: str, base: str, experts: list[Any], options: dict[str, Any]) -> Recipe:
    names = ("data", "dtype", "targets", "coefficients", "router", "allow_base_mismatch")
    above = {name: options.pop(name) for name in names if name in options}
    if "recipe_seed" in options:
        above["seed"] = options.pop("recipe_seed")
    return {"base": base, "experts": experts, kind: {"method": method, **options}, **above}


def simple_merges() -> dict[str, Recipe]:
    """Merges that need the weights alone."""
    weighted = ["one", {"expert": "two", "weight": 2}, {"expert": "three", "weight": -0.5}]
    return {
        "linear": merge("linear"),
        "linear-weights": merge("linear", experts=weighted),
        "linear-unequal": merge("linear", experts=UNEQUAL),
        "linear-bfloat16": merge("linear", dtype="bfloat16"),
        "linear-float16": merge("linear", dtype="float16"),
        "linear-targets": merge("linear", targets=r".*\.self_attn\.(q|v)_proj"),
        "linear-dense": merge("linear", experts=DENSE),
        "linear-stored-forms": merge("linear", experts=["sharded", "halved", "decomposed"]),
        "linear-trained": merge("linear", experts=["taught", "tuned"]),
        "linear-user-registry": merge("linear", experts=["mine", "one"]),
        "linear-folders": merge("linear", base="./bases/llama", experts=["./experts/one", "two"]),
        "linear-versions": merge("linear", experts=["two@1", "two@2"]),
        "linear-labels": merge("linear", experts=[{"expert": "one", "as": "first"}, "one"]),
        "linear-half-factors": merge("linear", experts=["one", "halffactors"]),
        "linear-embedding": merge("linear", experts=["one", "embedded"]),
        "linear-mismatch": merge(
            "linear", base="other", experts=["taught"], allow_base_mismatch=True
        ),
        "linear-untied": merge("linear", base="other", experts=["one", "embedded"]),
        "linear-gpt2": merge("linear", base="gpt2", experts=["conv-one", "conv-two"]),
        "linear-encoder": merge("linear", base="encoder", experts=["words", "letters"]),
        "task-arithmetic": merge("task_arithmetic"),
        "task-arithmetic-forget": merge("task_arithmetic", scale=-0.5, experts=["one"]),
        "task-arithmetic-dense": merge("task_arithmetic", scale=1, experts=DENSE),
        "task-arithmetic-gpt2": merge("task_arithmetic", base="gpt2", experts=["conv-one"]),
        "ties": merge("ties"),
        "ties-tensor": merge("ties", trim_scope="tensor", density=0.3),
        "ties-sum": merge("ties", normalize=False, scale=0.5),
        "ties-weights": merge("ties", experts=weighted),
        "ties-dense": merge("ties", experts=DENSE),
        "ties-gpt2": merge("ties", base="gpt2", experts=["conv-one", "conv-two"]),
        "ties-targets": merge("ties", targets=r".*\.mlp\..*"),
        "dare": merge("dare"),
        "dare-l1": merge("dare", rescale="l1", density=0.4),
        "dare-none": merge("dare", rescale="none", density=0.4, scale=1),
        "dare-seed": merge("dare", seed=7),
        "dare-recipe-seed": merge("dare", recipe_seed=7),
        "dare-dense": merge("dare", experts=DENSE),
        "dare-gpt2": merge("dare", base="gpt2", experts=["conv-one", "conv-two"]),
    }


def nested_and_parts() -> dict[str, Recipe]:
    """Merges inside of recipes, and recipes of several methods."""
    exact = {"merge": {"method": "linear"}, "experts": ["one", {"expert": "two", "weight": 2}]}
    named = {**exact, "as": "both", "weight": 0.5}
    small = {**exact, "rank": 3, "as": "short"}
    arithmetic = {"merge": {"method": "task_arithmetic", "scale": 0.7}, "experts": ["one", "low"]}
    signs = {"merge": {"method": "ties"}, "experts": ["one", "two"], "rank": 4, "as": "signs"}
    thinned = {"merge": {"method": "dare"}, "experts": ["one", "two"], "rank": 4, "as": "thinned"}
    whole = {
        "merge": {"method": "linear"},
        "experts": ["flat", "one"],
        "rank": 4,
        "as": "flattened",
    }
    mlp, attention = r".*\.mlp\..*", r".*\.self_attn\..*"
    chosen = {"method": "phatgoose", "kernel": "all"}
    parts = {
        "parts-merges": [
            {"targets": mlp, "merge": {"method": "ties"}},
            {"targets": attention, "merge": {"method": "linear"}},
        ],
        "parts-routes": [
            {"targets": mlp, "route": {"method": "arrow", "top_k": 2, "kernel": "all"}},
            {"targets": attention, "route": {**chosen, "top_k": 1}},
        ],
        "parts-both": [
            {"targets": mlp, "route": chosen},
            {"targets": attention, "merge": {"method": "dare"}},
        ],
        "parts-auto": [
            {"targets": mlp, "route": {"method": "phatgoose"}},
            {"targets": attention, "merge": {"method": "task_arithmetic"}},
        ],
    }
    return {
        "nested-exact": merge("linear", experts=[exact, "three"]),
        "nested-named": merge("task_arithmetic", experts=[named, "three"]),
        "nested-rank": merge("linear", experts=[small, "three"]),
        "nested-two": merge("linear", experts=[arithmetic, signs]),
        "nested-ties-in-ties": merge("ties", experts=[signs, "three"]),
        "nested-dare": merge("linear", experts=[thinned, "three"]),
        "nested-route": route("phatgoose", experts=[small, "three"], kernel="all", top_k=1),
        "nested-route-exact": route("phatgoose", experts=[exact, "three"], kernel="copied"),
        "nested-route-signs": route("arrow", experts=[signs, "three"], kernel="all"),
        "nested-route-dense": route("uniform", experts=[whole, "three"], kernel="all"),
        **{name: of(parts=value) for name, value in parts.items()},
    }


def learned_merges() -> dict[str, Recipe]:
    """Merges that look at data, or at coefficients that came of it."""
    labelled = {"data": LABELLED}
    plain = {"data": UNLABELLED}
    adam = {"steps": 4, "batch_size": 4, "lr": 0.05, **plain}
    search = {"steps": 9, **labelled}
    solved = {"data": OWN}
    made = {
        f"adamerging-{granularity}": merge("adamerging", granularity=granularity, **adam)
        for granularity in ("task", "layer", "block")
    }
    made |= {
        "adamerging-regex": merge("adamerging", granularity="(self_attn|mlp)", **adam),
        "adamerging-plus": merge("adamerging", plus_plus=True, density=0.3, **adam),
        "adamerging-marginal": merge("adamerging", objective="marginal_entropy", views=2, **adam),
        "adamerging-clamp": merge("adamerging", constraint="clamp", init=0.9, **adam),
        "adamerging-free": merge("adamerging", constraint="none", init=0.0, seed=3, **adam),
        "adamerging-dense": merge("adamerging", experts=DENSE, **adam),
        "adamerging-halves": merge("adamerging", experts=DENSE, halves=True, **adam),
        "adamerging-gpt2": merge(
            "adamerging", base="gpt2", experts=["conv-one", "conv-two"], **adam
        ),
        "adamerging-encoder": merge(
            "adamerging", base="encoder", experts=["words", "letters"], **adam
        ),
        "adamerging-stored": merge(
            "adamerging", granularity="layer", coefficients="kept-adamerging", **FEW
        ),
        "atlas-few-shot": merge("atlas", **FEW, **labelled),
        "atlas-shots": merge("atlas", **FEW, data={"tasks": TASKS[:1], "labels": True, "shots": 2}),
        "atlas-patience": merge("atlas", steps=8, patience=1, lr=0.5, batch_size=4, **labelled),
        "atlas-last": merge("atlas", patience=0, **FEW, **labelled),
        "atlas-addition": merge("atlas", setting="task_addition", **FEW, **labelled),
        "atlas-negation": merge("atlas", setting="negation", **FEW, **labelled),
        "atlas-forget": merge("atlas", setting="negation", forget=TASKS[1], **FEW, **labelled),
        "atlas-test-time": merge("atlas", setting="test_time", confidence=0.5, **FEW, **plain),
        "atlas-partition": merge("atlas", granularity="partition", groups=3, **FEW, **labelled),
        "atlas-block": merge("atlas", granularity="block", seed=5, **FEW, **labelled),
        "atlas-dense": merge("atlas", experts=DENSE, **FEW, **labelled),
        "atlas-stored": merge(
            "atlas", coefficients="kept-atlas", granularity="partition", groups=3, **FEW
        ),
        "lorahub": merge("lorahub", **search),
        "lorahub-outputs": merge("lorahub", combine="outputs", experts=UNEQUAL, **search),
        "lorahub-adam": merge("lorahub", optimizer="adam", lr=0.2, **search),
        "lorahub-stored": merge("lorahub", steps=9, coefficients="kept-lorahub"),
        "regmean": merge("regmean", **solved),
        "regmean-options": merge("regmean", off_diagonal=0.5, batch_size=4, **solved),
        "regmean-dense": merge("regmean", experts=DENSE, **solved),
        "regmean-gpt2": merge(
            "regmean",
            base="gpt2",
            experts=["conv-one", "conv-two"],
            data={"tasks": TASKS[:2], "limit": 6},
        ),
        "regmean-plusplus": merge("regmean_plusplus", **solved),
        "regmean-plusplus-dense": merge("regmean_plusplus", experts=DENSE, **solved),
        "fisher": merge("fisher", **solved),
        "fisher-seed": merge("fisher", floor=1e-3, seed=4, **solved),
        "fisher-dense": merge("fisher", experts=DENSE, **solved),
    }
    return made


def token_routes() -> dict[str, Recipe]:
    """Routes by token, with every kernel."""
    made = {}
    for kernel in ("all", "copied", "sampled", "screened"):
        made[f"phatgoose-{kernel}"] = route("phatgoose", kernel=kernel)
        made[f"arrow-{kernel}"] = route("arrow", kernel=kernel, top_k=2)
        made[f"phatgoose-parameters-{kernel}"] = route(
            "phatgoose", kernel=kernel, combine="parameters"
        )
    gated = ["one", {"expert": "low", "weight": 2}, "two"]
    conv = {"base": "gpt2", "experts": ["conv-one", "conv-two"]}
    general = ["one", "two", {"expert": "general", "as": "english"}]
    made |= {
        "phatgoose-auto": route("phatgoose"),
        "phatgoose-options": route("phatgoose", top_k=1, temperature=0.5, kernel="all"),
        "phatgoose-unequal": route("phatgoose", experts=gated, kernel="all"),
        "phatgoose-unequal-copied": route("phatgoose", experts=gated, kernel="copied"),
        "phatgoose-unequal-sampled": route("phatgoose", experts=gated, kernel="sampled"),
        "phatgoose-targets": route("phatgoose", targets=r".*\.mlp\..*", kernel="all"),
        "phatgoose-bfloat16": route("phatgoose", dtype="bfloat16", kernel="copied"),
        "phatgoose-gpt2": route("phatgoose", kernel="all", **conv),
        "phatgoose-gpt2-copied": route("phatgoose", kernel="copied", top_k=1, **conv),
        "arrow-auto": route("arrow"),
        "arrow-options": route("arrow", top_k=1, temperature=2.0, kernel="all"),
        "arrow-parameters": route("arrow", combine="parameters", kernel="all"),
        "arrow-unequal": route("arrow", experts=UNEQUAL, kernel="all"),
        "arrow-general": route("arrow", experts=general, gks=["english"], kernel="all"),
        "arrow-general-copied": route(
            "arrow", experts=general, gks=["english"], top_k=1, kernel="copied"
        ),
        "arrow-gpt2": route("arrow", kernel="sampled", **conv),
        "arrow-bfloat16": route("arrow", dtype="bfloat16", kernel="all"),
        "uniform": route("uniform", kernel="all"),
        "uniform-auto": route("uniform"),
        "uniform-parameters": route("uniform", combine="parameters", kernel="all"),
        "uniform-weights": route("uniform", experts=UNEQUAL, kernel="all"),
        "uniform-gpt2": route("uniform", kernel="all", **conv),
        "average-activation": route("average_activation", examples=6, kernel="all"),
        "average-activation-options": route(
            "average_activation", examples=4, top_k=1, temperature=0.5, kernel="copied"
        ),
        "average-activation-parameters": route(
            "average_activation", examples=4, combine="parameters", kernel="all"
        ),
        "average-activation-gpt2": route("average_activation", examples=4, kernel="all", **conv),
        "average-activation-stored": route(
            "average_activation", examples=6, router="kept-activations", kernel="all"
        ),
        "smear": route("smear", kernel="all"),
        "smear-auto": route("smear"),
        "smear-outputs": route("smear", combine="outputs", kernel="all"),
        "smear-temperature": route("smear", temperature=0.3, kernel="all"),
        "smear-gpt2": route("smear", kernel="all", **conv),
    }
    return made


def example_routes() -> dict[str, Recipe]:
    """Routes by example, by task, by data, and over skills."""
    conv = {"base": "gpt2", "experts": ["conv-one", "conv-two"]}
    words = {"base": "encoder", "experts": ["words", "letters"]}
    trained = {"steps": 3, "batch_size": 4, "data": LABELLED}
    return {
        "task": route("task"),
        "task-base": route("task", unknown="base"),
        "task-refuse": route("task", unknown="refuse"),
        "task-parameters": route("task", combine="parameters"),
        "task-kernel": route("task", kernel="copied"),
        "task-gpt2": route("task", **conv),
        "task-encoder": route("task", **words),
        "retrieval": route("retrieval", **ENCODED),
        "retrieval-kernel": route("retrieval", kernel="all", **ENCODED),
        "retrieval-gpt2": route("retrieval", **ENCODED, **conv),
        "retrieval-encoder": route("retrieval", **ENCODED, **words),
        "retrieval-stored": route("retrieval", router="kept-index", **ENCODED),
        "lora-retriever": route("lora_retriever", **ENCODED),
        "lora-retriever-options": route(
            "lora_retriever", top_k=2, combine="parameters", examples=4, embedder="encoder"
        ),
        "best-individual": route("best_individual", data=LABELLED),
        "best-individual-stored": route("best_individual", router="kept-scores"),
        "xlora": route("xlora", size=8, **trained),
        "xlora-options": route(
            "xlora", depth=2, size=8, layerwise=False, top_k=2, temperature=0.5, seed=3, **trained
        ),
        "xlora-parameters": route("xlora", combine="parameters", size=8, **trained),
        "xlora-gpt2": route("xlora", size=8, **trained, **conv),
        "xlora-encoder": route("xlora", size=8, **trained, **words),
        "xlora-stored": route("xlora", size=8, steps=3, batch_size=4, router="kept-classifier"),
        "mhr-task": route("mhr", experts=["skills-mhr"], task=TASKS[0]),
        "mhr-average": route("mhr", experts=["skills-mhr"], task="average"),
        "mhr-rows": route("mhr", experts=["skills-mhr"]),
        "mhr-adapted": route("mhr", experts=["skills-adapted"]),
        "mhr-adapted-router": route("mhr", experts=["skills-adapted-z"]),
        "mhr-mean": merge("linear", experts=["skills-adapted-mu", "one"]),
        "poly-task": route("poly", experts=["skills-poly"], task=TASKS[1]),
        "poly-average": route("poly", experts=["skills-poly"], task="average"),
        "poly-rows": route("poly", experts=["skills-poly"]),
        "poly-layer": route("poly", experts=["skills-shared"], task=TASKS[1]),
        "smear-encoder": route("smear", kernel="all", **words),
    }


def other_kinds() -> dict[str, Recipe]:
    """Recipes of bases that are neither causal language models nor encoders."""
    made = {}
    for base in ("seq2seq", "text", "image", "clip"):
        experts = [f"{base}-lora", {"expert": f"{base}-full", "weight": 0.5}]
        task = "made:shades" if base in ("seq2seq", "text") else "made:pictures"
        data = {"tasks": [task], "limit": 6}
        both = {"base": base, "experts": experts}
        made |= {
            f"linear-{base}": merge("linear", **both),
            f"ties-{base}": merge("ties", **both),
            f"adamerging-{base}": merge(
                "adamerging", objective="marginal_entropy", views=2, **FEW, **both, data=data
            ),
            f"atlas-{base}": merge("atlas", **FEW, **both, data={**data, "labels": True}),
            f"regmean-{base}": merge(
                "regmean", base=base, experts=[f"{base}-full"], data={**data, "limit": 4}
            ),
            f"arrow-{base}": route("arrow", base=base, experts=[f"{base}-lora"] * 2, kernel="all"),
        }
    gated = ["seq2seq-lora"]
    made["phatgoose-seq2seq"] = route("phatgoose", base="seq2seq", experts=gated, kernel="copied")
    return made


def banks() -> dict[str, Recipe]:
    """Routes over experts of so many bytes that they are packed into a bank."""
    many = [{"expert": f"wide-{i % 4}", "as": f"w{i}"} for i in range(40)]
    return {
        "bank-phatgoose": route("phatgoose", experts=many, kernel="copied"),
        "bank-screened": route("phatgoose", experts=many, top_k=1, kernel="screened"),
        "bank-arrow": route("arrow", experts=many, kernel="sampled"),
        "bank-task": route("task", experts=many),
    }


def all_recipes() -> dict[str, Recipe]:
    """Return every frozen recipe by its name."""
    made: dict[str, Recipe] = {}
    groups = (
        simple_merges,
        nested_and_parts,
        learned_merges,
        token_routes,
        example_routes,
        other_kinds,
        banks,
    )
    for group in groups:
        made |= group()
    return made


def write_recipes(folder: Path) -> None:
    """Write every recipe as a file of its name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, recipe in all_recipes().items():
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)
        (folder / f"{name}.yaml").write_text(text)
