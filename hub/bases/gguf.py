"""The conversion of GGUF files into model folders with safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.formats.gguf_header import check_gguf
from experthub.hub.formats.model_config import check_configs
from experthub.hub.transfer.remotes.no_network import forbid_network


def convert_gguf(weights: Path, target: Path) -> None:
    """Convert a GGUF file into a model folder: configuration, tokenizer and float32 safetensors.

    Args:
        weights: The GGUF file.
        target: The folder that the files are written into; it must exist.

    Raises:
        IntegrityError: The file is damaged, or transformers cannot read it.
        HubError: The package gguf is not installed.
        IntegrityError: A configuration beside the GGUF file names code or other files.
    """
    check_configs(weights.parent)
    check_gguf(weights)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise HubError("the package gguf is not installed", "run pip install gguf") from None
    from experthub.hub.bases.building import LOCAL, hide_progress_bars
    from experthub.hub.bases.model_size import limit_model_size
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(weights.parent),
        "gguf_file": weights.name,
        **LOCAL,
    }
    with weights.open("rb") as file:
        tensors = int.from_bytes(file.read(16)[8:], "little")  # After the mark and the version.
    entries = 8 * weights.stat().st_size  # Every entry has at least one bit.
    limit = limit_model_size(target.name, min(tensors, 100_000), entries)
    damage = _explain_damage(weights.name, (Exception,))
    with hide_progress_bars(), forbid_network(), damage, limit:
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
