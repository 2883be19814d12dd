"""Base models as folders: read, fingerprinted, converted to safetensors, loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.digests import canonical_json, digest_of
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.model_config import check_model
from experthub.hub.formats.safetensors_header import hashed_tensors, read_header

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
CAUSAL = ("ForCausalLM", "LMHeadModel")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True)
class Base:
    """A base model in a folder: config.json, safetensors, and a tokenizer if it has one.

    shapes: parameter name -> shape, tied output embeddings included.  fingerprint: of its weights
    as stored.  sources: where it came from, and can be had again.  sha256: of the source's file.
    tied: a parameter that is not stored -> the one whose weights it shares.
    """

    name: str
    folder: Path
    fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    tensor_bytes: int
    dtype: str
    sources: tuple[str, ...] = ()
    sha256: str | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @property
    def architecture(self) -> str:
        """The class that its config.json names."""
        return str((read_json(self.folder / "config.json").get("architectures") or [""])[0])

    @property
    def causal(self) -> bool:
        """Whether it is a causal language model."""
        return self.architecture.endswith(CAUSAL)

    @property
    def encoder(self) -> bool:
        """Whether it is a bare encoder, whose hidden states are what it gives."""
        bare = self.architecture.endswith("Model") and self.architecture != "CLIPModel"
        return bare and not self.causal


def read(folder: Path, name: str) -> Base:
    """Read a model folder's headers and fingerprint; NotFoundError when it is none."""
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"there is no model folder {folder}", "it has no config.json")
    config = check_model(folder)
    files = weight_files(folder)
    tensors = {n: info for file in files for n, info in read_header(file).items()}
    shapes = {n: info.shape for n, info in tensors.items()}
    tied: dict[str, str] = {}
    causal = str((config.get("architectures") or [""])[0]).endswith(CAUSAL)
    if causal and config.get("tie_word_embeddings", False) and "lm_head.weight" not in shapes:
        embeddings = [n for n in shapes if n.endswith(EMBEDDINGS)]
        if len(embeddings) == 1:
            tied["lm_head.weight"] = embeddings[0]
            shapes["lm_head.weight"] = shapes[embeddings[0]]
    dtypes = sorted(
        {i.dtype for i in tensors.values()}, key=[i.dtype for i in tensors.values()].count
    )
    size = sum(info.bytes for info in tensors.values())
    dtype = dtypes[-1] if dtypes else "F32"
    return Base(name, folder, fingerprint(folder), shapes, size, dtype, tied=tied)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; IntegrityError for pickles or missing shards."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise IntegrityError(f"{folder} holds no model.safetensors", "only safetensors is read")
    stated = read_json(index).get("weight_map")
    if (
        not stated
        or not isinstance(stated, dict)
        or not all(isinstance(n, str) for n in stated.values())
    ):
        raise IntegrityError(f"{index}: its weight_map is none", "fetch the base again")
    names = sorted(set(stated.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) or not (folder / name).is_file():
            raise IntegrityError(f"{folder}: shard {name!r} is missing", "fetch the base again")
    return [folder / name for name in names]


def fingerprint(folder: Path, fresh: bool = False) -> str:
    """sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of all tensors, cached.

    fresh: read the bytes again, whatever the cache says.
    """
    files = weight_files(folder)
    stats = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(canonical_json(stats)).hexdigest()
    cache = hub_home() / "fingerprints" / f"{key}.json"
    if not fresh and (known := _cached(cache, stats)):
        return known
    rows = [[n, d, list(s), h] for n, d, s, h in hashed_tensors(files)]
    value = digest_of(sorted(rows))
    write_json(cache, {"files": stats, "fingerprint": value, "check": digest_of([stats, value])})
    return value


def _cached(cache: Path, stats: list[list[Any]]) -> str | None:
    """A fingerprint that is known for files with these sizes and times; a damaged one is not."""
    try:
        record = read_json(cache) if cache.is_file() else {}
    except HubError:
        return None
    value = record.get("fingerprint")
    return value if record.get("check") == digest_of([stats, value]) else None


def convert_gguf(weights: Path, target: Path) -> None:
    """Write a GGUF model as config, tokenizer and float32 safetensors."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise HubError("reading GGUF needs the gguf package", "pip install gguf") from None
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(weights.parent),
        "gguf_file": weights.name,
    }
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(**place, dtype="float32")
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)
    model.config.architectures = [type(model).__name__]
    del model.config.quantization_config
    model.config.save_pretrained(target)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    keep = model.config.tie_word_embeddings
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (keep and name in tied)
    }
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal: the hub has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(base: Base, dtype: str, device: str | None) -> Any:
    """The base as a frozen transformers model in eval mode.

    dtype: `float32`, `bfloat16` or `float16`.  device: `cpu` by default.
    """
    check_device(device)
    kind, config = _class_of(base)
    with _refusing(base):
        model = kind.from_pretrained(base.folder, config=config, dtype=dtype, **LOCAL)
    return model.to(device or "cpu").eval().requires_grad_(False)


def linear_modules(base: Base) -> dict[str, bool]:
    """Module path of every linear layer -> whether its weight is stored `[I, O]` (Conv1D).

    Told by the model's class, made without weights.
    """
    import torch

    kind, config = _class_of(base)
    with torch.device("meta"):
        modules = dict(kind(config).named_modules())
    conv = {name for name, module in modules.items() if type(module).__name__ == "Conv1D"}
    return {n: n in conv for n, m in modules.items() if n in conv or isinstance(m, torch.nn.Linear)}


def _class_of(base: Base) -> tuple[Any, Any]:
    """The class in transformers that a base's configuration names, and the configuration."""
    import transformers

    kind: Any = getattr(transformers, base.architecture or "-", None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise HubError(
            f"base {base.name}: transformers has no class {base.architecture or '(none stated)'}",
            "state one in the architectures of its config.json",
        )
    with _refusing(base):
        return kind, transformers.AutoConfig.from_pretrained(base.folder, **LOCAL)


@contextmanager
def _refusing(base: Base) -> Iterator[None]:
    """What transformers raises, in words."""
    try:
        with without_bars():
            yield
    except _refusals() as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(
            f"base {base.name}: transformers cannot load it: {reason}",
            "check its config.json; code that comes with a model is never run",
        ) from None


def _refusals() -> tuple[type[Exception], ...]:
    """What transformers raises for a configuration that it cannot make a model of."""
    strict: type[Exception] = import_module("huggingface_hub.errors").StrictDataclassError
    wrong = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*wrong, OSError, RuntimeError, TypeError, ValueError, strict)


def check_device(device: str | None) -> None:
    """Raise UsageError for a device that torch cannot use here."""
    import torch

    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"cannot use the device {device!r}: {str(error).splitlines()[0]}",
            "use cpu, or install a torch that supports the device",
        ) from None


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer; HubError when it has none."""
    if not base.has_tokenizer:
        raise HubError(
            f"base {base.name} has no tokenizer",
            "composing works; for text, put the tokenizer's files into its folder",
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, **LOCAL)
