"""The conversion of GGUF files into model folders with safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.formats.gguf_header import check_gguf
from experthub.hub.formats.model_config import check_configs
from experthub.hub.progress import Report, silent
from experthub.hub.transfer.remotes.no_network import forbid_network

# What `gguf.dequantize` reads; the numbers are those of ggml.
READABLE = {*range(4), *range(6, 9), *range(10, 15), *range(16, 24), *range(29, 31), 34, 35, 39, 40}
_one_reader = Lock()


def convert_gguf(weights: Path, target: Path, report: Report = silent) -> None:
    """Convert a GGUF file into a model folder: configuration, tokenizer and float32 safetensors.

    Args:
        weights: The GGUF file. Nothing beside it is read, unless it lies in `target`.
        target: The folder that the files are written into; it must exist.
        report: A progress callback.

    Raises:
        IntegrityError: The file is damaged, or transformers cannot read it.
        HubError: The package gguf is not installed, or tensors have a type that it cannot read.
        IntegrityError: A configuration beside the GGUF file names code or other files.
    """
    check_configs(target)
    _check_types(weights.name, check_gguf(weights))
    from experthub.hub.bases.building import LOCAL, hide_progress_bars
    from experthub.hub.bases.model_size import limit_model_size
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(target),
        "gguf_file": str(weights.resolve()),
        **LOCAL,
    }
    with weights.open("rb") as file:
        tensors = int.from_bytes(file.read(16)[8:], "little")  # After the mark and the version.
    entries = 8 * weights.stat().st_size  # Every entry has at least one bit.
    limit = limit_model_size(target.name, min(tensors, 100_000), entries)
    damage = _explain_damage(weights.name, (Exception,))
    with hide_progress_bars(), _replace_bar(report), forbid_network(), damage, limit:
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
def _replace_bar(report: Report) -> Iterator[None]:
    """Replace the progress bar of transformers' reader, which its settings do not hide."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def count(tensors: Sequence[Any], **options: Any) -> Iterator[Any]:
        for i, tensor in enumerate(tensors):
            yield tensor
            report("converting GGUF tensors", i + 1, len(tensors))

    with _one_reader:  # The name belongs to the process.
        shown = getattr(reader, "tqdm", None)
        reader.tqdm = count
        try:
            yield
        finally:
            reader.tqdm = shown


def join_gguf(parts: Sequence[Path], target: Path) -> None:
    """Join the parts of a GGUF file that was split by llama.cpp.

    Args:
        parts: The parts, in their order. The first one has the settings of the model.
        target: The file to write.

    Raises:
        IntegrityError: A part is damaged.
        HubError: The package gguf is not installed, or tensors have a type that it cannot read.
    """
    for part in parts:
        _check_types(part.name, check_gguf(part))
    import gguf

    with _explain_damage(parts[0].name, (Exception,)):
        readers = [gguf.GGUFReader(part) for part in parts]
        architecture = readers[0].fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(target, architecture)
        for name, field in readers[0].fields.items():
            # The writer adds the counts and the architecture itself.
            if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
                continue
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
        tensors = [tensor for reader in readers for tensor in reader.tensors]
        for tensor in tensors:
            data = tensor.data
            writer.add_tensor_info(
                tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data)
        writer.close()


def _check_types(name: str, types: set[int]) -> None:
    """Refuse tensors of types that the package gguf cannot read, by their names."""
    try:
        import gguf
    except ImportError:
        raise HubError("the package gguf is not installed", "run pip install gguf") from None
    known = {int(kind.value): kind.name for kind in gguf.GGMLQuantizationType}
    if strange := sorted(types - READABLE):
        names = ", ".join(known.get(kind, f"number {kind}") for kind in strange)
        raise HubError(
            f"{name} has tensors of the type {names}, which transformers cannot read",
            "use a file of another type, such as Q4_K_M, Q8_0, F16 or BF16",
        )


@contextmanager
def _explain_damage(name: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn errors of transformers, gguf and tokenizers into one; the last raises Exception itself."""
    try:
        yield
    except errors as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise IntegrityError(
            f"{name} cannot be read as a model: {reason}",
            "use a GGUF file of an architecture that transformers can read, or safetensors",
        ) from None
