"""A folder with one sound input of every kind, and the commands that read each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import make_expert, run_hub, tiny_bert, tiny_llama
from experthub.hub.bases import base as bases
from experthub.hub.formats.skills import SkillsRecord, write_skills
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf, write_gguf_lora
from wild_adapters import write_diffusers, write_kohya, write_mlx, write_pickle

MODULES = [
    f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TASK = ("--task", "local:parity")
QUICK = ("--steps", "1", "--examples", "2", "--batch-size", "2")

RECIPES = {
    "merge.yaml": "experts: [a, b]\nmerge: {method: task_arithmetic}\n",
    "vector.yaml": "experts: [v]\nmerge: {method: linear}\n",
    "route.yaml": "experts: [a, b]\nroute: {method: phatgoose}\n",
    "arrow.yaml": "experts: [a, b]\nroute: {method: arrow}\n",
    "skills.yaml": "experts: [s]\nroute: {method: poly}\n",
    "learned.yaml": "experts: [a, b]\nmerge: {method: adamerging}\ncoefficients: c\n",
    "best.yaml": "experts: [a, b]\nroute: {method: best_individual}\nrouter: best\n",
    "mean.yaml": "experts: [a, b]\nroute: {method: average_activation, examples: 2}\nrouter: mean\n",
    "near.yaml": "experts: [a, b]\nroute: {method: retrieval, examples: 2, embedder: ENCODER}\nrouter: near\n",
    "lorar.yaml": "experts: [a, b]\nroute: {method: lora_retriever, examples: 2, embedder: ENCODER}\nrouter: lorar\n",
    "xlora.yaml": "experts: [a, b]\nroute: {method: xlora}\nrouter: xlora\n",
}
DATA = "data: {tasks: [local:parity], split: train, limit: 4%s}\n"
MAKE = {
    "c": ("coefficients", "merge: {method: adamerging, steps: 1, batch_size: 2}", DATA % ""),
    "best": ("router", "route: {method: best_individual}", DATA % ", labels: true"),
    "mean": ("router", "route: {method: average_activation, examples: 2}", ""),
    "near": ("router", "route: {method: retrieval, examples: 2, embedder: ENCODER}", ""),
    "lorar": ("router", "route: {method: lora_retriever, examples: 2, embedder: ENCODER}", ""),
    "xlora": ("router", "route: {method: xlora, steps: 1, batch_size: 2}", DATA % ", labels: true"),
}


PROMPT = ("--prompt", "x")
NEAR = ("--by", "embeddings", "--embedder", "../encoder")
LIMIT = ("--tasks", "local:parity", "--limit", "2", "--no-cache")
ROUTED = ("route", "arrow", "skills", "best", "mean", "near", "lorar", "xlora")

# Command -> the lines by which it reads everything of the folder that it can read.
LINES: dict[str, list[tuple[str, ...]]] = {
    "list": [("list", "--json"), ("list", "--bases")],
    "search": [("search", "parity")],
    "show": [("show", "a", "--json"), ("show", "tiny"), ("show", "near")],
    "add": [("add", f"../{name}", "--name", "n") for name in "avs"],
    "pull": [
        ("pull", "a", "tiny"),
        ("pull", "file:../b", "--name", "x"),
        ("pull", "file:archive.tar#a@1", "--name", "y"),
    ],
    "push": [("push", "a", "file:../shared")],
    "export": [("export", "a", "v", "out.tar"), ("export", "a", "out", "--portable")],
    "import": [("import", "archive.tar")],
    "diff": [("diff", "../base", "../finetuned", "--name", "d")],
    "methods": [("methods", "--json")],
    "compose": [
        *((("compose", f"{name}.yaml", "--out", "out")) for name in ("merge", "vector", "learned")),
        ("compose", "merge.yaml", "--plan"),
        ("compose", "merge.yaml", "--out", "out", "--frozen"),
    ],
    "generate": [
        *(("generate", f"{name}.yaml", *PROMPT, "--max-new-tokens", "2") for name in ROUTED),
        ("generate", "merge.yaml", *PROMPT, "--chat", "--temperature", "0.5"),
    ],
    "coefficients": [("coefficients", "learned.yaml")],
    "router": [("router", "near.yaml"), ("router", "xlora.yaml", "--json")],
    "lock": [("lock", "merge.yaml", "near.yaml"), ("lock", "merge.yaml", "--check")],
    "update": [("update", "a")],
    "eval": [("eval", "merge.yaml", "best.yaml", "near.yaml", *LIMIT)],
    "trace": [
        ("trace", "route.yaml", *PROMPT, "--chat", "--generate", "2"),
        ("trace", "near.yaml", *TASK, "--limit", "2"),
    ],
    "suggest": [("suggest", *TASK, "a", "b", "--limit", "4", *NEAR)],
    "cluster": [("cluster", "a", "b", "--k", "2"), ("cluster", "a", "b", "--k", "2", *NEAR)],
    "du": [("du",)],
    "doctor": [("doctor",)],
    "base add": [
        ("base", "add", "copy", "../copy"),
        ("base", "add", "other", "../model.gguf", "--aka", "someone/other"),
        ("base", "add", "blob", "ollama:tiny"),
    ],
    "base list": [("base", "list"), ("base", "list", "--json")],
    "base show": [("base", "show", "tiny"), ("base", "show", "mine", "--json")],
    "base rm": [("base", "rm", "mine", "--json")],
    "convert": [
        *(("convert", f"../{name}", "out") for name in ("dora", "mlx", "pickled")),
        *(("convert", f"../{name}", "out", "--base", "tiny") for name in ("kohya", "diffusers")),
        ("convert", "../lora.gguf", "out", "--base", "gguf"),
        ("convert", "../dora", "out", "--rank", "1", "--json"),
    ],
    "train lora": [("train", "lora", "--base", "tiny", *TASK, "--name", "t1", *QUICK)],
    "train full": [
        ("train", "full", "--base", "tiny", *TASK, "--name", "t2", "--lr", "0.1", "--steps", "2")
    ],
    "train gate": [("train", "gate", "a", *QUICK)],
    "train skills": [
        ("train", "skills", "--base", "tiny", "--tasks", "local:parity", "--name", "t3", *QUICK)
    ],
    "train adapt": [
        ("train", "adapt", "s", *TASK, "--name", "t4", "--steps", "1", "--batch-size", "2")
    ],
    "tasks list": [("tasks", "list")],
    "tasks import": [("tasks", "import", "../task", "--suite", "other")],
    "verify": [("verify", "--repair")],
    "gc": [("gc", "--yes", "--grace", "0")],
    "rm": [("rm", "a", "--yes")],
}


@dataclass(frozen=True)
class World:
    """The folder: bases, experts, a task and recipes, and a home that has them all."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name


def build(root: Path) -> World:
    """Make the folder, with HUB_HOME at `home` and the current folder at `work`."""
    world = World(root)
    tiny_llama(world.base)
    config = json.loads((world.base / "tokenizer_config.json").read_text())
    (world.base / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": TEMPLATE})
    )
    tiny_bert(world.encoder)
    shutil.copytree(world.base, world.finetuned)
    tensors = load_file(world.finetuned / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, world.finetuned / "model.safetensors", {"format": "pt"})
    leaves = ("q_proj", "v_proj")
    for seed, name in enumerate(("a", "b")):
        make_expert(world.root / name, world.base, seed, 2, leaves, size=0.1)
    world.v.mkdir()
    save_file({"model.norm.weight": torch.ones(32)}, world.v / "task_vector.safetensors")
    write_inventory(world.s, world.base)
    write_foreign(world)
    card = Card(name="parity", source="made-up", template="Is {input} even?\nAnswer:")
    choices = ["yes", "no"]
    examples = [
        Example(id=example_id(str(n), choices), input=str(n), choices=choices, answer=n % 2)
        for n in range(60)
    ]
    write_task("local", card, examples)
    shutil.copytree(world.home / "tasks/local/parity", world.root / "task")
    registry = f"version: 1\nbases:\n  tiny: {{sources: ['file:{world.base}']}}\n"
    registry += f"  gguf: {{sources: ['file:{world.root / 'model.gguf'}']}}\n"
    (world.work / "registry.yaml").write_text(registry)
    done("base", "add", "mine", "../finetuned", "--license", "mit")
    for name in ("a", "b", "v", "s"):
        done("add", world.root / name, "--name", name, "--base", "tiny", *TASK)
    for name, (command, method, data) in MAKE.items():
        text = f"base: tiny\nexperts: [a, b]\n{method}\n{data}".replace(
            "ENCODER", str(world.encoder)
        )
        (world.work / "make.yaml").write_text(text)
        done(command, "make.yaml", "--name", name)
    (world.work / "make.yaml").unlink()
    for name, text in RECIPES.items():
        text = text.replace("ENCODER", str(world.encoder))
        (world.work / name).write_text(f"base: tiny\n{text}")
        done("lock", name)
    done("eval", "merge.yaml", "--tasks", "local:parity", "--limit", "4", "--out", "result.json")
    done("export", "a", "v", "archive.tar")
    return world


def write_foreign(world: World) -> None:
    """Write adapters and bases of other programs."""
    shutil.copytree(world.base, world.copy)
    make_expert(world.dora, world.base, 3, 2, ("q_proj",), size=0.1)
    config = json.loads((world.dora / "adapter_config.json").read_text()) | {"use_dora": True}
    (world.dora / "adapter_config.json").write_text(json.dumps(config))
    (world.dora / "phatgoose_gates.safetensors").unlink(missing_ok=True)
    path = world.dora / "adapter_model.safetensors"
    tensors = load_file(path)
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(tensor))
        for name, tensor in tensors.items()
        if name.endswith("lora_B.weight")
    }
    save_file(tensors | magnitudes, path)
    write_mlx(world.base, world.mlx, 4)
    write_pickle(world.base, world.pickled, 5)
    write_kohya(world.kohya)
    part = "text_encoder.model.layers.0.self_attn"
    write_diffusers(world.diffusers, part)
    write_gguf(world.root / "model.gguf")
    write_gguf_lora(world.root / "lora.gguf", 4)
    blob = world.ollama / "blobs" / f"sha256-{'a' * 64}"
    manifest = world.ollama / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    for folder in (blob.parent, manifest.parent):
        folder.mkdir(parents=True)
    write_gguf(blob, kv_heads=2)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}"}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))


def write_inventory(folder: Path, base: Path) -> None:
    """Write an inventory of two skills for two tasks."""
    shapes = bases.read(base, "base").shapes
    record = SkillsRecord(
        router="poly",
        n_skills=2,
        n_heads=1,
        rank=2,
        alpha=2.0,
        tasks=["local:parity", "t2"],
        target_modules=MODULES,
        base="tiny",
    )
    skills = {}
    for module in MODULES:
        outputs, inputs = shapes[f"{module}.weight"]
        factors = torch.randn(2, 2, inputs) * 0.1, torch.randn(2, outputs, 2) * 0.1
        skills[module] = (*factors, torch.randn(2, 1, 2))
    folder.mkdir()
    write_skills(folder, record, skills)


def list_commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
    """The names of all commands of the application, such as `train lora`."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words)
        return
    for name, one in inner.items():
        yield from list_commands(one, (*words, name))


def done(*words: Any) -> None:
    """Run a command that must succeed."""
    ran = run_hub(*words)
    assert ran.code == 0, (words, ran.err)
