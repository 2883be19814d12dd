"""The names of the files of a model folder, besides its weights and `config.json`."""

from __future__ import annotations

import re
from pathlib import Path

from experthub.hub.errors import HubError
from experthub.hub.formats.safetensors_header import read_header

TEMPLATES = "additional_chat_templates"
# Vocabularies that transformers needs only where there is no tokenizer.json.
OTHER_VOCABULARIES = (
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
    *("spm_char.model", "source.spm", "target.spm", "bpe.codes", "dict.txt", "tiktoken.model"),
    "prophetnet.tokenizer",
)
READ_BY_TRANSFORMERS = (
    # Tokenizers: their settings, and every vocabulary file that a class of transformers reads.
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json"),
    *("byte_maps.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json"),
    *("entity_vocab.json", "emoji.json", "normalizer.json"),
    *("word_pronunciation.json", "word_shape.json"),
    *OTHER_VOCABULARIES,
    # Chat templates.
    *("chat_template.jinja", "chat_template.json"),
    # Processors of images, videos and sounds.
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
)
# sentence-transformers lists the parts of an encoder, such as its pooling, in the first file.
MODULES = "modules.json"
SENTENCE_FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
MODULE_FOLDER = re.compile(r"\d{1,2}_[A-Za-z0-9_]{1,40}")
PART_FILES = ("config.json", "model.safetensors")
DIGESTS = "files.json"  # The hub writes a manifest of what it unpacked under this name.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*_TERMS*")


def list_companions(folder: Path) -> list[str]:
    """List the files that belong to a model besides its weights and configurations.

    They are the files of tokenizers, templates and processors, the licence, and the parts that
    sentence-transformers lists. A part may have weights of its own, in safetensors. Code and
    pickles are never among them.

    Args:
        folder: The model folder.

    Returns:
        The paths relative to the folder, sorted.

    Raises:
        HubError: A part of a sentence encoder has weights that are not safetensors.
        IntegrityError: The weights of a part are damaged.
    """
    names = {name for name in READ_BY_TRANSFORMERS if (folder / name).is_file()}
    for pattern in (*SENTENCE_FILES, *LICENCES, f"{TEMPLATES}/*.jinja"):
        found = (path for path in folder.glob(pattern) if path.is_file())
        names |= {p.relative_to(folder).as_posix() for p in found if p.suffix not in (".py", ".sh")}
    if MODULES in names:
        for part in filter(Path.is_dir, folder.iterdir()):
            if MODULE_FOLDER.fullmatch(part.name):
                names |= {f"{part.name}/{path.name}" for path in _list_part_files(part)}
    return sorted(names)


def _list_part_files(folder: Path) -> list[Path]:
    """List the configuration and the weights of a part; refuse weights that are a pickle."""
    files = [folder / name for name in PART_FILES]
    weights = files[-1]
    if weights.is_file():
        read_header(weights)
    elif any(folder.glob("*.bin")):
        raise HubError(
            f"{folder} has its weights in a pickle, which is never read",
            "save the encoder again with sentence-transformers, as safetensors",
        )
    return [path for path in files if path.is_file()]
