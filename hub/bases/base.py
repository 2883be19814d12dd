"""Base models as folders: the record of a base, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.bases.fingerprint import compute_fingerprint, list_weight_files
from experthub.hub.bases.identity import compute_base_digest
from experthub.hub.bases.names import ModelNames
from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.added_tokens import AddedVocabulary
from experthub.hub.formats.model_config import check_model
from experthub.hub.formats.quantisation import Quantisation, read_quantisation
from experthub.hub.formats.safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
CAUSAL = ("ForCausalLM", "LMHeadModel")
COMPARING = ("CLIPModel", "SiglipModel")  # Models that compare images with texts.
# The parts of models that read images or sounds beside text.
TOWERS = ("vision_config", "audio_config", "vq_config")
ROW_INPUTS = ("input_ids", "pixel_values")  # The first inputs of models that a route can watch.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True)
class Base:
    """A base model in a folder: config.json, safetensors, and a tokenizer if it has one.

    Args:
        name: The name in the registry, or the reference by which the base was found.
        folder: The model folder.
        fingerprint: The fingerprint of the stored weights, see `compute_fingerprint`. Experts are
            checked against it.
        digest: The digest of everything that changes what the base computes, see
            `compute_base_digest`.
        stored: The shapes of the stored tensors by the names that they have in the files.
        tensor_bytes: The size of all stored tensors in bytes.
        dtype: The dtype that most tensors are stored in, as safetensors names it.
        sources: The sources from which the base can be fetched again.
        sha256: The sha256 of the source's file, if the registry records it.
        commit: The commit of the repository that the folder was fetched from; None for others.
        quantisation: The way in which the weights are quantised; None if they are not.
        aka: Other names of the base in the registry, such as `org/name` on the Hugging Face Hub.
        completed: Whether the experts of a plan bring along the weights that the files lack.
        added: What the experts of a plan add to the vocabulary.
    """

    name: str
    folder: Path
    fingerprint: str
    digest: str
    stored: dict[str, tuple[int, ...]]
    tensor_bytes: int
    dtype: str
    sources: tuple[str, ...] = ()
    sha256: str | None = None
    commit: str | None = None
    quantisation: Quantisation | None = None
    aka: tuple[str, ...] = ()
    completed: bool = False
    added: AddedVocabulary | None = None

    def read_weight(self, name: str) -> Tensor:
        """Read a parameter of the model from the files.

        Args:
            name: The name of the parameter.

        Returns:
            The tensor, in the dtype in which it is stored.

        Raises:
            HubError: The files lack the parameter, or store it quantised.
        """
        from experthub.hub.bases.stored_weights import read_stored

        return read_stored(self.folder, self.names, name, self.name)

    @property
    def lacks(self) -> frozenset[str]:
        """The parameters that the files lack."""
        return frozenset(self.names.missing)

    @cached_property
    def names(self) -> ModelNames:
        """The names of the model's parameters. The first use builds the model without storage."""
        from experthub.hub.bases.name_map import read_names

        return read_names(self)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter of the model, tied output embeddings included."""
        return self.names.shapes

    @property
    def tied(self) -> Mapping[str, str]:
        """The parameters that are not stored, each with the one whose weights it shares."""
        return self.names.tied

    @property
    def has_tokenizer(self) -> bool:
        """True if the folder has the files of a tokenizer."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @property
    def architecture(self) -> str:
        """The class of transformers that config.json names; an empty text if it names none."""
        return _find_architecture(read_json(self.folder / "config.json"))

    @property
    def portable_name(self) -> str:
        """The name, without the path if the name is a folder on this machine."""
        return self.folder.resolve().name if self.name == str(self.folder) else self.name

    @property
    def public_name(self) -> str:
        """The name by which other programs find the base: that of its repository, if it has one."""
        hubs = (s.removeprefix("hf:").partition("@")[0] for s in self.sources if s[:3] == "hf:")
        return next(iter((*self.aka, *hubs)), self.name)

    @property
    def reads_rows(self) -> bool:
        """True if all modules read the rows of one input, so that a router can decide for rows."""
        config = read_json(self.folder / "config.json")
        towers = [v for v in config.values() if isinstance(v, dict) and "model_type" in v]
        one_input = self.names.main_input in ROW_INPUTS and not config.get("is_encoder_decoder")
        kinds = self.is_causal or self._is_bare
        return one_input and not towers and not self.is_multimodal and kinds

    @property
    def peft_task_type(self) -> str | None:
        """The task type of an adapter of factors alone in PEFT's format; None if it has none.

        PEFT calls models of its types with texts alone. An adapter of its type of classifiers has
        to contain the classifier.
        """
        if self.is_causal and not self.is_multimodal:
            return "CAUSAL_LM"
        config = read_json(self.folder / "config.json")
        if config.get("is_encoder_decoder"):
            generates = self.architecture.endswith("ForConditionalGeneration")
            return "SEQ_2_SEQ_LM" if generates and self.reads_text else None
        return "FEATURE_EXTRACTION" if self.reads_rows and self.reads_text else None

    @property
    def reads_text(self) -> bool:
        """True if the model's first input is text."""
        return self.names.main_input == "input_ids"

    @property
    def is_causal(self) -> bool:
        """True for a causal language model, also for one that can read images or sounds, too."""
        return self.architecture.endswith(CAUSAL) or self.is_multimodal

    @cached_property
    def is_multimodal(self) -> bool:
        """True for a causal language model that reads text alone, or with images or sounds."""
        config = read_json(self.folder / "config.json")
        parts = [config, *(v for v in (config.get("text_config"),) if isinstance(v, dict))]
        return (
            self.architecture.endswith("ForConditionalGeneration")
            and not any(part.get("is_encoder_decoder") for part in parts)
            and any(isinstance(config.get(key), dict) for key in TOWERS)
            and self.reads_text
        )

    @property
    def is_encoder(self) -> bool:
        """True for a bare encoder of text, whose output is its hidden states."""
        towers = read_json(self.folder / "config.json").keys() & {*TOWERS}
        return self._is_bare and not towers and self.reads_text

    @property
    def _is_bare(self) -> bool:
        """True for a model without a head, whatever it reads."""
        bare = self.architecture.endswith("Model") and self.architecture not in COMPARING
        return bare and not self.is_causal


def _find_architecture(config: dict[str, Any]) -> str:
    """Return the class that the content of config.json names; an empty text if it names none."""
    return str((config.get("architectures") or [""])[0])


def read(folder: Path, name: str) -> Base:
    """Read the configuration, the headers and the fingerprint of a model folder.

    Args:
        folder: The model folder.
        name: The name that the base gets.

    Returns:
        The base.

    Raises:
        NotFoundError: The folder has no config.json.
        IntegrityError: The configuration or the weights cannot be used.
    """
    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        if files:
            raise NotFoundError(
                f"{folder} has no config.json, but {len(files)} GGUF files",
                f"name the file, {folder / files[0]}",
            )
        raise NotFoundError(
            f"there is no model folder {folder}",
            "name a folder that contains a config.json, or a base that hub list --bases shows",
        )
    config = check_model(folder)
    shards = list_weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in shards:
        for tensor, info in read_header(file).items():
            # The fingerprint does not tell in which of two files a tensor is.
            if tensor in tensors:
                raise IntegrityError(
                    f"{folder}: the tensor {tensor} is in {file.name} and in another shard",
                    "save the model again, or fetch it again",
                )
            tensors[tensor] = info
    stored = {n: info.shape for n, info in tensors.items()}
    dtypes = sorted(
        {i.dtype for i in tensors.values()}, key=[i.dtype for i in tensors.values()].count
    )
    size = sum(info.bytes for info in tensors.values())
    dtype = dtypes[-1] if dtypes else "F32"
    quantisation = read_quantisation(config)
    if quantisation is not None:  # The dtype of most tensors says nothing about packed weights.
        stated = str(config.get("dtype") or config.get("torch_dtype"))
        dtype = {"bfloat16": "BF16", "float16": "F16"}.get(stated, "F32")
    fingerprint = compute_fingerprint(folder)
    digest = compute_base_digest(folder, fingerprint)
    known = name, folder, fingerprint, digest, stored, size, dtype
    return Base(*known, quantisation=quantisation)
