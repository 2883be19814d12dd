"""Readers of images: classifiers with their own heads, CLIP and SigLIP with heads made from text.

Shapes: N inputs, H and W pixels, L labels of a classifier, D features.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from experthub.hub.readers.preparation import Preparation
from experthub.hub.readers.reader import (
    HeadCache,
    ReadsInput,
    compare_with_heads,
    find_pad_token,
    pad,
    select_columns,
)
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.text import find_columns
from experthub.hub.readers.tokens import tokenise
from experthub.hub.readers.window import Window
from torch import Tensor

# A variation moves an image by a share of its width, and adds noise by a share of its deviation.
SHIFT, NOISE = 0.07, 0.05


@dataclass(frozen=True, eq=False)
class ImageRow:
    """The pixels `[3, H, W]` of an image, normalised for the model, and its choices."""

    pixels: Tensor
    choices: Any
    size = 1
    answers = 0

    def vary(self, seed: int) -> ImageRow:
        """Move the image by some pixels and add noise; never mirror it, because of letters.

        Args:
            seed: The seed of the variation.

        Returns:
            The variation.
        """
        own = zlib.crc32(self.pixels.numpy().tobytes(), seed & 0xFFFFFFFF)
        random = torch.Generator().manual_seed(own)
        limit = max(1, round(SHIFT * self.pixels.shape[-1]))
        moves = torch.randint(-limit, limit + 1, (2,), generator=random).tolist()
        moved = torch.roll(self.pixels, moves, (-2, -1))
        noise = torch.randn(self.pixels.shape, generator=random)
        return replace(self, pixels=moved + NOISE * noise)


class ImageClassifier(ReadsInput):
    """A reader for image classifiers: the outputs of the frozen head for a question's choices."""

    name = "classifier-logits"
    real: Tensor | None = None

    def __init__(self, preparation: Preparation, labels: dict[str, int]) -> None:
        self.preparation, self.labels = preparation, labels

    def row(self, question: Question) -> ImageRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The pixels, and the outputs of the choices.
        """
        pixels = self.preparation.pixels(question.text)
        return ImageRow(pixels, find_columns(question.choices, self.labels))

    def read(self, model: Any, rows: Sequence[ImageRow]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The classifier.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: its outputs.
        """
        device = next(model.parameters()).device
        logits_NL = model(pixel_values=torch.stack([row.pixels for row in rows]).to(device)).logits
        return select_columns(logits_NL.float(), [row.choices for row in rows])


class ClipReader(ReadsInput):
    """A reader for CLIP: the scaled cosines with the frozen embeddings of the choices.

    Radford et al., https://arxiv.org/abs/2103.00020, section 3.1.2.
    """

    name = "clip-cosine"
    template = "a photo of a {}."
    real: Tensor | None = None

    def __init__(
        self,
        preparation: Preparation,
        tokenizer: Any,
        base: Callable[[], Any],
        window: Window | None = None,
    ) -> None:
        """Create a reader.

        Args:
            preparation: The normalisation of the images.
            tokenizer: The tokenizer of the base.
            base: A function that returns the model that embeds the choices, whichever model reads
                the images.
            window: The window of the text model; None keeps all tokens of a choice.
        """
        self.preparation, self.tokenizer, self.base = preparation, tokenizer, base
        self.window = window
        self.heads = HeadCache(self._embed_choices)

    def row(self, question: Question) -> ImageRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The pixels, and the embeddings of the choices.
        """
        return ImageRow(self.preparation.pixels(question.text), self.heads(question.choices))

    def read(self, model: Any, rows: Sequence[ImageRow]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The model of both.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: scaled cosines.
        """
        device = next(model.parameters()).device
        pixels = torch.stack([row.pixels for row in rows]).to(device)
        image_ND = torch.nn.functional.normalize(self._embed_images(model, pixels).float(), dim=-1)
        scale = model.logit_scale.detach().exp()
        return compare_with_heads(image_ND, [row.choices for row in rows], scale)

    @torch.no_grad()
    def _embed_choices(self, choices: Sequence[str]) -> Tensor:
        """Embed choices with the base; return the unit embeddings `[C, D]`."""
        model = self.base()
        texts = [self.template.format(choice) for choice in choices]
        rows = [tokenise(self.tokenizer, text, self.window) for text in texts]
        found = self._embed_texts(model, rows, next(model.parameters()).device)
        return torch.nn.functional.normalize(found.float(), dim=-1)

    def _embed_images(self, model: Any, pixels: Tensor) -> Any:
        """Embed images `[N, 3, H, W]`; return `[N, D]`."""
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def _embed_texts(self, model: Any, rows: Sequence[Sequence[int]], device: Any) -> Any:
        """Embed texts as token ids; return `[N, D]`."""
        ids, real = pad(rows, device, token=find_pad_token(model))
        found = model.text_model(input_ids=ids, attention_mask=real.long()).pooler_output
        return model.text_projection(found)


class SiglipReader(ClipReader):
    """A reader for SigLIP: as for CLIP. Zhai et al., https://arxiv.org/abs/2303.15343.

    The model adds a bias to all cosines, which changes no choice and is left out. It was trained
    with texts that are padded to the end of its window, and reads the padding, too.
    """

    name = "siglip-cosine"
    template = "This is a photo of {}."

    def _embed_images(self, model: Any, pixels: Tensor) -> Any:
        return model.vision_model(pixel_values=pixels).pooler_output

    def _embed_texts(self, model: Any, rows: Sequence[Sequence[int]], device: Any) -> Any:
        width, token = model.config.text_config.max_position_embeddings, self.tokenizer.pad_token_id
        filler = find_pad_token(model) if token is None else token
        filled = [[*row, *[max(0, filler or 0)] * (width - len(row))] for row in rows]
        return model.text_model(input_ids=torch.tensor(filled, device=device)).pooler_output
