"""Compose the frozen recipes, run the frozen commands, and describe what they give.

Only the public API is used here, `experthub.hub` and the command `hub`, so that the modules behind
it may move.  What is described does not depend on where the store lies, or on when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import os
import platform
import re
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import torch
import yaml
from experthub import hub
from frozen.earlier import earlier_lock, earlier_text, earlier_values
from torch import Tensor

HERE = Path(__file__).parent
STORE, RECIPES, LOCKS = HERE / "home.tar.xz", HERE / "recipes", HERE / "locks"
GOLDENS, OUTPUTS = HERE / "goldens.json", HERE / "outputs.safetensors"
TEXTS = ["cat dog hen 7", "RED BLUE", "42"]
SAID = ["made:colours", "one", "made:numbers"]
BY_TASK = ("task", "mhr", "poly")
TUNED = ("phatgoose", "arrow", "average_activation", "smear", "uniform")
KINDS = ("merge", "route")
WHOLE = (  # of these the whole model is written
    "adamerging-layer",
    "linear",
    "linear-bfloat16",
    "linear-dense",
    "linear-embedding",
    "linear-encoder",
    "linear-gpt2",
    "linear-untied",
    "mhr-task",
    "nested-exact",
    "parts-merges",
    "phatgoose-all",
    "poly-average",
    "ties",
)
LEARNS = re.compile("^data:|average_activation|retriev", re.MULTILINE)
OUTPUT = ("logits", "logits_per_text", "last_hidden_state")
WRITERS = ("llama", "other", "gpt2")
EVERY = 8  # of the last dimension, one in so many is kept


def surroundings() -> dict[str, Any]:
    """Return what bits depend on besides the code."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "numpy": version("numpy"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


@cache
def unpacked() -> bytes:
    """Return the store as a plain archive."""
    return lzma.decompress(STORE.read_bytes())


def unpack(folder: Path) -> Path:
    """Unpack the store into a new folder, with the recipes beside its registry."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(unpacked())) as archive:
        archive.extractall(folder, filter="data")
    for path in sorted(RECIPES.glob("*.yaml")):
        (folder / path.name).write_text(path.read_text())
    return folder


@contextlib.contextmanager
def inside(project: Path) -> Iterator[None]:
    """Use a store on one thread, without a network, from its own folder."""
    variables = {"HUB_HOME": str(project / "home"), "HUB_OFFLINE": "1"}
    before, place = {name: os.environ.get(name) for name in variables}, Path.cwd()
    threads = torch.get_num_threads()
    os.environ.update(variables)
    os.chdir(project)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.chdir(place)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run_hub(*words: str) -> tuple[int, str, str]:
    """Run the command `hub` in this process; return its exit code and what it wrote."""
    (command,) = entry_points(group="console_scripts", name="hub")
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGINT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command.load()(list(words))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        signal.signal(signal.SIGINT, handler)
    return code, out.getvalue(), err.getvalue()


@dataclass
class Found:
    """A result of a recipe or a command.

    always: values that hold on every machine.  here: values that depend on bits.  tensors: outputs,
    of which every machine gives nearly the same.  lock: the text of the lock file.  exact: whether
    the same machine gives the same bits; it does not where kernels are chosen by their speed.
    """

    always: dict[str, Any] = field(default_factory=dict)
    here: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lock: str | None = None
    exact: bool = True


def sha256(content: bytes) -> str:
    """Return the digest of some bytes."""
    return hashlib.sha256(content).hexdigest()


def bits_of(tensors: dict[str, Tensor]) -> str:
    """Return one digest of all tensors, with their names, shapes and types."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def without_bits(lock: str) -> str:
    """Return a lock without the digest of what was learned, which depends on bits."""
    found: str = re.sub(
        r"((?:coefficients|router):\n(?:  .*\n)*?  digest: )\S+", r"\1<made anew>", lock
    )
    return found


def placeless(lock: str, project: Path) -> str:
    """Return a lock as it is, or where it names the store's place, without that and without its seal.

    A lock names folders in full where the recipe does, and where a state was made just now.  Its
    seal, the digest of the lines above it, depends on them, and is checked here.
    """
    lines = lock.splitlines(keepends=True)
    above, seal = "".join(lines[:-1]), lines[-1].strip().rpartition(" ")[2]
    assert sha256(above.encode()) == seal
    if str(project) not in above:
        return lock
    return above.replace(str(project), "<project>") + lines[-1].replace(seal, "<seal>")


def files_of(folder: Path, project: Path) -> dict[str, str]:
    """Return the digest of every file of a folder, with the store's place taken out of texts."""
    return {
        str(path.relative_to(folder)): sha256(
            path.read_bytes().replace(str(project).encode(), b"<project>")
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shared() -> dict[str, Any]:
    """Return the argument by which several calls share the registries that were read."""
    registry = hub.Registry.read()
    if hasattr(hub, "Session"):  # the version that was frozen has none
        return {"session": hub.Session(registry)}
    return {"registry": registry}


class Observer:
    """The frozen recipes, in one unpacked store."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.tokenizers: dict[str, Any] = {}
        self.plain: dict[str, dict[str, Tensor]] = {}
        self.shared = shared()
        self.locked = False

    def batch(self, base: str, side: str) -> dict[str, Tensor]:
        """Return the fixed texts as padded inputs of a base."""
        from transformers import AutoTokenizer

        if base not in self.tokenizers:
            folder = self.project / "bases" / base.rpartition("/")[2]
            self.tokenizers[base] = AutoTokenizer.from_pretrained(folder)
        tokenizer = self.tokenizers[base]
        tokenizer.padding_side = side
        read = tokenizer(TEXTS, padding=True, return_tensors="pt")
        return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}

    def inputs(self, base: str) -> dict[str, Tensor]:
        """Return fixed inputs of a base: texts, pictures or both."""
        made: dict[str, Tensor] = {}
        if base != "image":
            made |= self.batch(base, "right")
        if base in ("image", "clip"):
            random = torch.Generator().manual_seed(0)
            made["pixel_values"] = torch.randn(3, 3, 16, 16, generator=random)
        if base == "seq2seq":
            made["decoder_input_ids"] = torch.tensor([[0, 101, 104], [0, 40, 41], [0, 50, 60]])
        return made

    def recipe(self, name: str) -> Found:
        """Compose one recipe, lock it, let it read and write, and export it."""
        path = self.project / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        methods = [part[k] for part in recipe.get("parts", [recipe]) for k in part if k in KINDS]
        found = Found()
        found.exact = not any(
            kind == "route" and way["method"] in TUNED and way.get("kernel", "auto") == "auto"
            for part in recipe.get("parts", [recipe])
            for kind, way in part.items()
            if kind in KINDS
        )
        composition = hub.compose(path, **self.shared)
        found.always["digest"] = composition.plan.weights_digest
        self._lock(name, composition, found)
        self._outputs(composition, recipe, methods, found)
        routed = any("route" in part for part in recipe.get("parts", [recipe]))
        if not routed:
            weights = dict(composition.model.state_dict())
            found.here["weights"] = bits_of(weights)
        if not routed or name in WHOLE or "skills" in str(recipe["experts"]):
            self._exports(name, composition, found)
        if (
            routed
            and "parts" not in recipe
            and recipe["base"] in ("llama", "gpt2", "encoder")
            and "dtype" not in recipe
        ):
            found.always["detached"] = self._detached(composition, recipe["base"])
        if name.startswith("bank"):
            self._again(path, found)
        return found

    def _again(self, path: Path, found: Found) -> None:
        """Compose a recipe of many bytes again, now from the bank that was made before."""
        found.always["banked"] = any((self.project / "home" / "banks").rglob("*.safetensors"))
        again = hub.compose(path, **self.shared)
        other = Found()
        recipe = yaml.safe_load(path.read_text())
        self._outputs(again, recipe, [recipe["route"]], other)
        found.always["the same from the bank"] = other.here == found.here

    def _lock(self, name: str, composition: Any, found: Found) -> None:
        """Lock the recipe, and check that its lock leads to the same composition."""
        lock = self.project / f"{name}.lock.yaml"
        if not self.locked:  # all that learn nothing at once, because it is faster
            self.locked = True
            paths = sorted(RECIPES.glob("*.yaml"))
            run_hub("lock", *(path.name for path in paths if not LEARNS.search(path.read_text())))
        if not lock.is_file():
            code, _, err = run_hub("lock", f"{name}.yaml")
            assert code == 0, err
        text = lock.read_text()
        found.lock = placeless(earlier_lock(text, self.project), self.project)
        for pins in ("locked", "frozen"):
            again = hub.plan_of(f"{name}.yaml", pins, **self.shared).digest
            assert again == composition.plan.digest, f"{name} is another one when it is {pins}"
        locked = yaml.safe_load(text)
        kept = locked.get("coefficients") or locked.get("router")
        if kept is None:
            return
        stored = self.project / kept["sources"][0].removeprefix("file:")
        if stored.is_dir():  # it was made now
            found.here["state"] = {"digest": kept["digest"]}
            for file in sorted(stored.glob("*.safetensors")) + sorted(stored.glob("*.json")):
                if file.name != "expert.json":
                    found.here["state"][file.name] = sha256(file.read_bytes())
            record = stored / "router.json"
            if record.is_file() and json.loads(record.read_text()).get("embedder"):
                # It names the encoder by its digest now, so that the state has another one.
                del found.here["state"]["digest"]
                text = earlier_text(record.read_text(), self.project)
                found.here["state"]["router.json"] = sha256(text.encode())

    def _outputs(
        self, composition: Any, recipe: dict[str, Any], methods: list[Any], found: Found
    ) -> None:
        """Let the model read a padded batch, and write greedily with its cache."""
        by_task = any(method["method"] in BY_TASK for method in methods)
        said = SAID if recipe["base"] != "encoder" else ["made:colours", "words", "made:numbers"]
        if any("unknown" in way and way["unknown"] == "refuse" for way in methods):
            said = ["made:colours", "one", "three"]
        if recipe["base"] == "gpt2":
            said = ["made:colours", "conv-one", "made:numbers"]
        saying = composition.tasks(said) if by_task else contextlib.nullcontext()
        with saying, torch.no_grad():
            read = composition.model(**self.inputs(recipe["base"]))
            outputs = next(read[name] for name in OUTPUT if name in read)
            found.here["outputs"] = bits_of({"outputs": outputs})
            some = outputs[..., ::EVERY] if outputs.shape[-1] > 2 * EVERY else outputs
            found.tensors["outputs"] = some.float().contiguous()
            if Path(recipe["base"]).name in WRITERS and "merge" not in recipe:
                batch = self.batch(recipe["base"], "left")
                written = composition.model.generate(**batch, max_new_tokens=6, do_sample=False)
                found.here["written"] = written[:, batch["input_ids"].shape[1] :].tolist()

    def _exports(self, name: str, composition: Any, found: Found) -> None:
        """Write the model in every format, and say which formats are refused."""
        for form in ("hf", "peft") if name in WHOLE else ("peft",):
            folder = self.project / "out" / f"{name}-{form}"
            try:
                composition.save(folder, format=form)
            except hub.HubError:
                found.always[f"saved as {form}"] = "refused"
                continue
            lock = folder / "recipe.lock.yaml"
            lock.write_text(earlier_lock(lock.read_text(), self.project))
            files = files_of(folder, self.project)
            found.always[f"saved as {form}"] = sorted(files)
            found.here[f"saved as {form}"] = files

    def _detached(self, composition: Any, base: str) -> bool | str:
        """Say whether the base is back, bit for bit, when the route is taken off."""
        from transformers import AutoModel, AutoModelForCausalLM

        try:
            model = composition.detach()
        except hub.HubError:
            return "refused"
        batch = self.batch(base, "right")
        with torch.no_grad():
            if base not in self.plain:
                kind = AutoModel if base == "encoder" else AutoModelForCausalLM
                plain = kind.from_pretrained(self.project / "bases" / base)
                self.plain[base] = _tensors(plain(**batch))
            found = _tensors(model(**batch))
        return all(torch.equal(found[name], t) for name, t in self.plain[base].items())


def _tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a model that are tensors, and not its cache."""
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


EVALUATED = "eval linear.yaml phatgoose-all.yaml --tasks made:numbers --split test"
TRACED = "trace phatgoose-all.yaml --prompt cat --generate 2 --module .*1.*(q|down)_proj"
POOL = "one two three"
COMMANDS = {
    "methods": "methods --json",
    "list": "list --json",
    "list-bases": "list --bases --json",
    "show": "show one --json",
    "show-mine": "show mine --json",
    "show-base": "show llama --json",
    "tasks": "tasks list --json",
    "plan-merge": "compose linear-unequal.yaml --json",
    "plan-route": "compose arrow-general.yaml --json",
    "plan-parts": "compose parts-both.yaml --json",
    "plan-data": "compose atlas-partition.yaml --json",
    "lock": "lock linear.yaml nested-route.yaml --json",
    "generate-merge": "generate linear.yaml --prompt cat --max-new-tokens 8 --json",
    "generate-route": "generate phatgoose-all.yaml --prompt cat --max-new-tokens 8 --json",
    "generate-sampled": "generate linear.yaml --prompt cat --max-new-tokens 8 --temperature 1 --json",
    "eval-alone": f"{EVALUATED} --json",
    "eval-controls": f"{EVALUATED} --limit 8 --controls --json",
    "eval-sum": f"{EVALUATED} --limit 8 --score sum --json",
    "eval-byte": f"{EVALUATED} --limit 8 --score byte --json",
    "eval-task": "eval task.yaml --tasks made:animals,made:colours --limit 6 --json",
    "eval-learned": "eval adamerging-layer.yaml regmean.yaml --tasks made:numbers --limit 8 --json",
    "eval-encoder": "eval linear-encoder.yaml task-encoder.yaml --tasks made:colours --json",
    "eval-seq2seq": "eval linear-seq2seq.yaml adamerging-seq2seq.yaml --tasks made:shades --json",
    "eval-text": "eval linear-text.yaml arrow-text.yaml --tasks made:shades --json",
    "eval-image": "eval linear-image.yaml atlas-image.yaml --tasks made:pictures --json",
    "eval-clip": "eval linear-clip.yaml ties-clip.yaml --tasks made:pictures --json",
    "eval-gpt2": "eval linear-gpt2.yaml --tasks made:numbers --limit 8 --json",
    "coefficients-task": "coefficients adamerging-task.yaml --json",
    "coefficients-partition": "coefficients atlas-partition.yaml --json",
    "coefficients-lorahub": "coefficients lorahub.yaml --json",
    "coefficients-stored": "coefficients atlas-stored.yaml --json",
    "router-retrieval": "router retrieval.yaml --json",
    "router-xlora": "router xlora.yaml --json",
    "router-activations": "router average-activation.yaml --json",
    "router-stored": "router retrieval-stored.yaml --json",
    "trace": f"{TRACED} --json",
    "trace-task": "trace arrow-all.yaml --task made:animals --limit 2 --module .*0.*v_proj --json",
    "trace-smear": "trace smear.yaml --prompt RED --module .*0.*q_proj --json",
    "suggest-gates": f"suggest {POOL} --task made:numbers --by gates --examples 8 --json",
    "suggest-prototypes": f"suggest {POOL} --task made:numbers --by prototypes --examples 8 --json",
    "suggest-embeddings": f"suggest {POOL} --task made:numbers --by embeddings --embedder encoder "
    "--examples 8 --json",
    "suggest-all": f"suggest {POOL} --task made:numbers --embedder encoder --labels --truth "
    "--limit 6 --examples 8 --json",
    "suggest-absolute": f"suggest {POOL} --task made:numbers --by gates --absolute --examples 8 "
    "--json",
    "suggest-recipe": f"suggest {POOL} --task made:numbers --by gates --examples 8 --k 2 "
    "--out made.yaml --json",
    "cluster-weights": f"cluster {POOL} low --k 2 --json",
    "cluster-gates": f"cluster {POOL} --k 2 --by gates --json",
    "cluster-embeddings": f"cluster {POOL} --k 2 --by embeddings --embedder encoder --json",
    "cluster-recipe": f"cluster {POOL} --k 2 --rank 3 --method phatgoose --out made.yaml --json",
    "export": "export one taught made.tar --json",
    "export-portable": "export low --portable made --json",
    "push": "push two@1 file:shared --json",
    "diff": "diff llama ./tuned-llama --name full-again --json",
    "diff-sparse": "diff llama ./tuned-llama --name sparse-again --sparse 0.3 --dtype float16 --json",
    "diff-rank": "diff llama ./tuned-llama --name small-again --rank 2 --json",
    "train-lora": "train lora --base llama --task made:numbers --name new --rank 2 --steps 3 "
    "--batch-size 4 --json",
    "train-gate": "train gate three --steps 2 --batch-size 4 --json",
    "train-full": "train full --base llama --task made:numbers --name new --steps 2 --batch-size 4 "
    "--json",
    "train-skills": "train skills --base llama --tasks made:animals --tasks made:numbers --name new "
    "--skills 2 --heads 2 --rank 2 --steps 2 --batch-size 4 --json",
    "train-adapt": "train adapt skills-poly --task made:numbers --name new --steps 2 "
    "--batch-size 4 --json",
    "train-encoder": "train lora --base encoder --task made:numbers --name new --rank 2 --steps 2 "
    "--batch-size 4 --json",
    "verify": "verify --json",
}
# These write into the store, or list what they have written: each has one of its own.
ALONE = (
    "eval",
    "train",
    "diff",
    "export",
    "push",
    "verify",
    "suggest-recipe",
    "cluster-recipe",
    "suggest-all",
)
# What these print does not depend on bits.
CERTAIN = ("methods", "list", "show", "tasks", "plan", "lock", "verify")
LISTS = {"list": "experts", "list-bases": "bases"}
WRITTEN = ("made.yaml", "made.tar", "made", "shared")
DROPPED = {"environment", "experthub", "created", "date", "seconds", "modified", "bytes_free"}


def command(name: str, project: Path) -> Found:
    """Run one command in a store; describe what it printed and what it wrote."""
    code, out, err = run_hub(*COMMANDS[name].split())
    assert code == 0, err
    found = Found()
    part = found.always if name.startswith(CERTAIN) else found.here
    printed = cleaned(earlier_values(json.loads(out), project), project)
    if name in LISTS:  # without what comes with the package
        key = LISTS[name]
        printed[key] = [item for item in printed[key] if "<project>" in str(item["sources"])]
    printed.get("verify", {}).pop("absent", None)
    part["printed"] = printed
    for place in WRITTEN:
        path = project / place
        if path.is_file():
            found.here[place] = sha256(path.read_bytes().replace(str(project).encode(), b""))
        elif path.is_dir():
            found.here[place] = files_of(path, project)
    results = project / "home" / "results"
    if results.is_dir() and name.startswith(ALONE):
        found.here["results"] = sorted(str(p.relative_to(results)) for p in results.rglob("*.json"))
    return found


def cleaned(value: Any, project: Path) -> Any:
    """Return plain values without places, times and versions."""
    if isinstance(value, dict):
        return {k: cleaned(v, project) for k, v in value.items() if k not in DROPPED}
    if isinstance(value, list):
        return [cleaned(v, project) for v in value]
    return value.replace(str(project), "<project>") if isinstance(value, str) else value
