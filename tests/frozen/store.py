"""Build the small store of tiny random models and experts that the frozen recipes are of.

What is random is drawn from fixed seeds; what is trained is trained by the `hub` command.  The
store is a folder with `registry.yaml`, `bases/`, `experts/`, `tasks/` and `home/`, the HUB_HOME.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from experthub.hub import sealed
from frozen.cases import run_hub
from frozen.recipes import all_recipes
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COLOURS = ["red", "green", "blue"]
CONVS = ("c_attn", "c_proj", "c_fc")
MADE_AGAIN = ("leases", "locks", "roots", "fingerprints", "kernels", "drafts", "partial", "runs")
KEPT = {
    "kept-adamerging": "adamerging-layer-kept",
    "kept-atlas": "atlas-partition",
    "kept-lorahub": "lorahub",
    "kept-activations": "average-activation",
    "kept-index": "retrieval",
    "kept-scores": "best-individual",
    "kept-classifier": "xlora",
}
TRAINED = [
    "train lora --base llama --task made:animals --name taught --rank 2 --steps 4 --batch-size 4",
    "train gate taught --steps 3 --batch-size 4",
    "train full --base llama --task made:colours --name tuned --steps 2 --batch-size 4 --lr 1e-3",
    "train skills --base llama --tasks made:animals --tasks made:colours --name skills-mhr "
    "--router mhr --skills 3 --heads 4 --rank 2 --steps 3 --batch-size 4",
    "train skills --base llama --tasks made:animals --tasks made:colours --name skills-poly "
    "--router poly --skills 2 --rank 2 --steps 3 --batch-size 4 --relaxed",
    "train skills --base llama --tasks made:animals --tasks made:colours --name skills-shared "
    "--router poly --skills 2 --rank 2 --granularity layer --steps 3 --batch-size 4",
    "train adapt skills-mhr --task made:numbers --name skills-adapted --steps 3 --batch-size 4",
    "train adapt skills-mhr --task made:numbers --name skills-adapted-z --tune z --steps 3 "
    "--batch-size 4",
    "train adapt skills-mhr --task made:numbers --name skills-adapted-mu --tune mu --steps 3 "
    "--batch-size 4",
    *(
        f"train {way} --base {base} --task made:{task} --name {base}-{way} --steps 2 --batch-size 4"
        f" --lr 0.05 {'--rank 2' if way == 'lora' else ''}"
        for base, task in (
            ("seq2seq", "shades"),
            ("text", "shades"),
            ("image", "pictures"),
            ("clip", "pictures"),
        )
        for way in ("lora", "full")
    ),
    "train gate seq2seq-lora --steps 2 --batch-size 4",
    "diff llama ./tuned-llama --name full",
    "diff llama ./tuned-llama --name sparse --sparse 0.2",
    "diff llama ./tuned-llama --name sharded --max-shard-size 8kB",
    "diff llama ./tuned-llama --name halved --dtype bfloat16",
    "diff llama ./tuned-linears --name decomposed --rank 3",
    "diff llama ./tuned-linears --name energetic --energy 0.9",
    "diff llama ./tuned-linears --name flat",
]


def done(words: list[str]) -> str:
    """Run the `hub` command and return what it printed; an error ends the script."""
    code, out, err = run_hub(*words)
    if code:
        raise SystemExit(f"hub {' '.join(words)} ended with {code}:\n{err}")
    return out


def drawn(seed: int, *shape: int, size: float = 0.3) -> torch.Tensor:
    """Return random numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def byte_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    made = Tokenizer(models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def llama(folder: Path, seed: int, tied: bool) -> None:
    """Write a random two-layer Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **SPECIAL,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder)


def gpt2(folder: Path) -> None:
    """Write a random GPT-2, whose linear modules are stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=260,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=0.3,
        **SPECIAL,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer(folder)


def encoder(folder: Path) -> None:
    """Write a random BERT, which serves as a sentence encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=132,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {c: i for i, c in enumerate(["[PAD]", "[UNK]", *map(chr, range(128))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=256
    ).save_pretrained(folder)


def characters(folder: Path) -> None:
    """Write a tokenizer of single characters that ends every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(128))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NAMED = {"id2label": dict(enumerate(COLOURS)), "label2id": {c: i for i, c in enumerate(COLOURS)}}


def seq2seq(folder: Path) -> None:
    """Write a random T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(5)
    config = T5Config(
        vocab_size=131,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        initializer_factor=0.5,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    characters(folder)


def image(folder: Path) -> None:
    """Write a random classifier of images, its tensors under the names of its modules."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(6)
    sizes = {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
    model = ViTForImageClassification(ViTConfig(**SMALL, **sizes, **NAMED))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def clip(folder: Path) -> None:
    """Write a random CLIP."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(7)
    factor = {"initializer_factor": 4.0}
    text = {"vocab_size": 131, "max_position_embeddings": 64}
    text |= {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**SMALL, **text, **factor},
        vision_config={**SMALL, "image_size": 16, "patch_size": 4, **factor},
        projection_dim=8,
        **factor,
    )
    CLIPModel(config).save_pretrained(folder)
    characters(folder)


def classifier(folder: Path) -> None:
    """Write a random classifier of texts."""
    from transformers import BertConfig, BertForSequenceClassification

    encoder(folder)
    torch.manual_seed(8)
    settings = json.loads((folder / "config.json").read_text())
    config = BertConfig(**{**settings, **NAMED})
    BertForSequenceClassification(config).save_pretrained(folder)


def labelled_task(folder: Path, pictures: bool) -> None:
    """Write a task of three labels, of words or of pictures."""
    folder.mkdir(parents=True)
    card = f"name: {folder.name}\nsource: made-up\nkind: labels\n"
    (folder / "card.yaml").write_text(card + f"labels: [{', '.join(COLOURS)}]\n")
    lines = []
    for number in range(40):
        word = ["fire", "grass", "sea"][number % 3]
        given = picture(number % 3, number) if pictures else f"{word} {number}"
        named = json.dumps([given, *COLOURS], separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        example = {"id": digest, "input": given, "targets": [COLOURS[number % 3]]}
        lines.append(json.dumps(example) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines))


def picture(colour: int, seed: int) -> str:
    """Return a square with some noise in one of three colours, as PNG in base64."""
    from PIL import Image

    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 90, (12, 12, 3), generator=random, dtype=torch.uint8)
    pixels[:, :, colour] += 150
    file = io.BytesIO()
    Image.frombytes("RGB", (12, 12), pixels.numpy().tobytes()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def task(folder: Path, words: list[str], choices: list[str]) -> None:
    """Write a task whose inputs are of a few words."""
    folder.mkdir(parents=True)
    card = f"name: {folder.name}\nsource: made-up\nlicense: cc0-1.0\n"
    card += f'template: "{{input}} ="\nlabels: [{", ".join(choices)}]\n'
    (folder / "card.yaml").write_text(card)
    lines = []
    for number in range(60):
        text = " ".join(words[(number * 7 + i * 3) % len(words)] for i in range(3)) + f" {number}"
        named = json.dumps([text, *choices], separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        example = {"id": digest, "input": text, "choices": choices, "answer": number % len(choices)}
        lines.append(json.dumps(example) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines))


def lora(
    folder: Path,
    base: Path,
    seed: int,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = LINEARS,
    gates: bool = True,
    dtype: torch.dtype = torch.float32,
    repeat: int = 1,
    embedding: bool = False,
    ranks: dict[str, int] | None = None,
    **config: Any,
) -> None:
    """Write a random LoRA as peft does.

    repeat: how often its ranks stand, for one of many bytes that compresses well.  ranks: module
    leaf -> its own rank.
    """
    shapes = {name: t.shape for name, t in load_file(base / "model.safetensors").items()}
    names = sorted(n.removesuffix(".weight") for n in shapes if n.endswith(".weight"))
    modules = [name for name in names if name.endswith(targets)]
    conv = bool(config.get("fan_in_fan_out"))
    tensors, gate = {}, {}
    for number, module in enumerate(modules):
        o, i = reversed(shapes[f"{module}.weight"]) if conv else shapes[f"{module}.weight"]
        r = (ranks or {}).get(module.rpartition(".")[2], rank)
        path = ("transformer." if conv and not module.startswith("transformer.") else "") + module
        at, start = 1000 * seed + 10 * number, f"base_model.model.{path}"
        a, b = drawn(at, r, i), drawn(at + 1, o, r)
        tensors[f"{start}.lora_A.weight"] = a.repeat(repeat, 1).to(dtype)
        tensors[f"{start}.lora_B.weight"] = b.repeat(1, repeat).to(dtype)
        gate[f"{path}.gate"] = drawn(at + 2, i, size=1.0)
    if embedding:
        o, i = shapes["model.embed_tokens.weight"]
        start = "base_model.model.model.embed_tokens"
        tensors[f"{start}.lora_embedding_A"] = drawn(1000 * seed + 901, rank, o)
        tensors[f"{start}.lora_embedding_B"] = drawn(1000 * seed + 902, i, rank)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank * repeat,
        "lora_alpha": 2 * rank,
        "target_modules": [*targets, *(["embed_tokens"] if embedding else [])],
        "bias": "none",
        "base_model_name_or_path": base.name,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings | config, indent=1))
    if gates:
        save_file(gate, folder / "phatgoose_gates.safetensors")


def tuned(base: Path, folder: Path, leaves: tuple[str, ...] | None) -> None:
    """Write a copy of a base whose parameters, or those of some modules, are changed a little."""
    shutil.copytree(base, folder)
    state = load_file(base / "model.safetensors")
    for number, name in enumerate(sorted(state)):
        if leaves is None or name.removesuffix(".weight").endswith(leaves):
            state[name] = state[name] + drawn(70_000 + number, *state[name].shape, size=0.1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def build(folder: Path) -> None:
    """Build the store in a new folder."""
    folder.mkdir(parents=True)
    os.environ["HUB_HOME"] = str(folder / "home")
    os.chdir(folder)
    bases = folder / "bases"
    llama(bases / "llama", 0, tied=True)
    llama(bases / "other", 1, tied=False)
    gpt2(bases / "gpt2")
    for write in (encoder, seq2seq, image, clip):
        write(bases / write.__name__)
    classifier(bases / "text")
    names = sorted(path.name for path in bases.iterdir())
    lines = [f"  {name}: {{sources: ['file:bases/{name}']}}\n" for name in names]
    Path("registry.yaml").write_text("version: 1\nbases:\n" + "".join(lines))
    task(folder / "tasks" / "animals", ["cat", "dog", "cow", "hen"], ["yes", "no"])
    task(folder / "tasks" / "colours", ["RED", "BLUE", "PINK", "TAN"], ["a", "bb", "c"])
    task(folder / "tasks" / "numbers", ["11", "22", "33", "44"], ["odd", "even"])
    labelled_task(folder / "tasks" / "shades", pictures=False)
    labelled_task(folder / "tasks" / "pictures", pictures=True)
    done(["tasks", "import", "./tasks", "--suite", "made"])
    add_experts(folder)
    tuned(bases / "llama", folder / "tuned-llama", None)
    tuned(bases / "llama", folder / "tuned-linears", LINEARS)
    for line in TRAINED:
        done(line.split())
    keep_states()
    for path in sorted(Path("home/registry").glob("*/*.yaml")):
        lines = path.read_text().replace(str(folder / "home"), "..").splitlines(keepends=True)
        text = "".join(line for line in lines if not line.startswith("# sha256 of the lines"))
        sealed.write(path, text.replace(f"file:{folder}", "file:../.."))
    again = [f"home/{name}" for name in MADE_AGAIN]
    wide = [f"experts/{name}" for name in (f"wide-{i}" for i in range(4))]
    for name in ["tuned-linears", *again, *wide]:
        shutil.rmtree(name, ignore_errors=True)


def add_experts(folder: Path) -> None:
    """Make the experts that nobody trains, and register them in the folder's own registry."""
    base, conv, bert = (folder / "bases" / name for name in ("llama", "gpt2", "encoder"))
    animals, colours, numbers = "made:animals", "made:colours", "made:numbers"
    transposed = {"targets": CONVS, "fan_in_fan_out": True}
    read = {"targets": ("query", "value"), "task_type": "FEATURE_EXTRACTION"}
    patterned = {"gates": False, "ranks": {"q_proj": 2, "up_proj": 5}}
    patterned |= {"rank_pattern": {"q_proj": 2, "up_proj": 5}, "alpha_pattern": {"k_proj": 12}}
    made: dict[str, tuple[Path, str | None, dict[str, Any]]] = {
        "one": (base, animals, {}),
        "two": (base, colours, {}),
        "three": (base, numbers, {}),
        "low": (base, None, {"rank": 2, "targets": LINEARS[:3], "use_rslora": True}),
        "patterned": (base, None, {"rank": 3, **patterned}),
        "general": (base, None, {"lora_alpha": 4}),
        "halffactors": (base, None, {"dtype": torch.bfloat16}),
        "embedded": (base, None, {"targets": ("q_proj",), "embedding": True, "gates": False}),
        "conv-one": (conv, animals, {"rank": 3, **transposed}),
        "conv-two": (conv, colours, {"rank": 3, **transposed}),
        "words": (bert, animals, read),
        "letters": (bert, colours, read),
    }
    made |= {f"wide-{i}": (base, animals, {"rank": 8, "repeat": 160}) for i in range(4)}
    for seed, (name, (own, trained_on, options)) in enumerate(made.items(), 1):
        place = folder / "experts" / name
        lora(place, own, seed, **options)
        words = ["add", str(place), "--name", name, "--base", own.name]
        words += ["--task", trained_on] if trained_on else []
        done([*words, "--registry", "registry.yaml"])
    lora(folder / "experts" / "two-2", base, 51)
    again = ["add", "experts/two-2", "--name", "two", "--version", "2", "--base", "llama"]
    done([*again, "--task", colours, "--registry", "registry.yaml"])
    lora(folder / "experts" / "mine", base, 52)
    done(["add", "experts/mine", "--name", "mine", "--base", "llama", "--task", numbers])


def keep_states() -> None:
    """Register what learned merges and routers are made of, for recipes that name it."""
    import yaml

    recipes = all_recipes()
    recipes["adamerging-layer-kept"] = {
        **recipes["adamerging-stored"],
        "data": recipes["adamerging-layer"]["data"],
    }
    del recipes["adamerging-layer-kept"]["coefficients"]
    for name, recipe in KEPT.items():
        path = Path(f"{recipe}.yaml")
        path.write_text(yaml.safe_dump(recipes[recipe]))
        command = "router" if "route" in recipes[recipe] else "coefficients"
        done([command, str(path), "--name", name])
        path.unlink()


def pack(folder: Path, target: Path) -> None:
    """Write a folder as an archive whose bytes depend on names and content alone."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size, info.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(info, file)
    target.write_bytes(lzma.compress(packed.getvalue(), preset=9))
