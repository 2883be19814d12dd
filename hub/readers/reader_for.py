"""The choice of the reader for a base."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from experthub.hub.bases.base import COMPARING, TOWERS, Base
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.errors import UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.progress import Report, silent
from experthub.hub.readers.images import ClipReader, ImageClassifier, SiglipReader
from experthub.hub.readers.preparation import Preparation
from experthub.hub.readers.reader import Reader
from experthub.hub.readers.scorer import Long
from experthub.hub.readers.similarity import Similarity, find_rule
from experthub.hub.readers.text import Encoder, LanguageModel, Seq2Seq, TextClassifier
from experthub.hub.readers.window import Window


def reader_for(
    base: Base,
    device: str | None,
    load: Callable[[], Any] | None = None,
    *,
    long: Long = "cut",
    report: Report = silent,
    virtual_tokens: int = 0,
) -> Reader:
    """Choose the reader for a base.

    Args:
        base: The base.
        device: The device to load the base on, if the reader needs the base's model.
        load: A function that returns the base's model. The default loads it when it is first
            needed: some readers make their heads from the text of the choices with it.
        long: The rule for texts with more tokens than the base can read.
        report: A callback for a note about texts that are cut.
        virtual_tokens: The number of tokens that soft prompts put before each text.

    Returns:
        The reader of the base's kind.

    Raises:
        UsageError: No reader can score choices with this kind of base.
    """
    load = load or cache(lambda: load_model(base, "float32", device))
    config = read_json(base.folder / "config.json")
    architecture = base.architecture
    if architecture.endswith("ForImageClassification"):
        preparation = Preparation.of(base, int(config.get("image_size", 224)))
        return ImageClassifier(preparation, _read_labels(config))
    seq2seq = architecture.endswith("ForConditionalGeneration") and base.reads_text
    seq2seq = seq2seq and bool(config.get("is_encoder_decoder"))
    classifier = architecture.endswith("ForSequenceClassification")
    comparing = dict(zip(COMPARING, (ClipReader, SiglipReader), strict=True)).get(architecture)
    if base.is_causal or seq2seq or classifier or comparing or base.is_encoder:
        tokenizer, window = load_tokenizer(base), Window.of(base, long, report, virtual_tokens)
        if comparing:
            side = int(config.get("vision_config", {}).get("image_size", 224))
            return comparing(Preparation.of(base, side), tokenizer, load, window)
        if classifier:
            return TextClassifier(tokenizer, _read_labels(config), window)
        if base.is_causal or seq2seq:
            return (LanguageModel if base.is_causal else Seq2Seq)(tokenizer, window)
        return Encoder(Similarity(load, tokenizer, window, find_rule(base)))
    raise _explain_refusal(base)


def _explain_refusal(base: Base) -> UsageError:
    """Explain why no reader can score choices with a base."""
    what, main = f"{base.name} is a {base.architecture}", base.names.main_input
    if main == "pixel_values":
        return UsageError(
            f"{what}, which reads images and has no labels to choose from",
            "use an image classifier, CLIP or SigLIP for a task of images",
        )
    if main != "input_ids":
        return UsageError(
            f"{what}, which reads {main.replace('_', ' ')}, and tasks have texts or images",
            "compose the model with hub compose --out, and evaluate it with another program",
        )
    if any(key in read_json(base.folder / "config.json") for key in TOWERS):
        return UsageError(
            f"{what}, which reads images with texts, and of such models the hub reads CLIP and SigLIP",
            "use CLIP or SigLIP for a task of images, or a language model for a task of texts",
        )
    return UsageError(
        f"{what}, which cannot score choices",
        "use a language model, an encoder of text, a classifier, CLIP or SigLIP",
    )


def _read_labels(config: dict[str, object]) -> dict[str, int]:
    """Read the output of each label from a classifier's configuration."""
    named = config.get("id2label")
    pairs = named.items() if isinstance(named, dict) else ()
    return {str(label): int(index) for index, label in pairs}
