"""Readers of images: classifiers with their own heads, CLIP with heads made from text.

The input of an example is a PNG or JPEG in base64, with or without `data:image/...;base64,`.

Shapes: N inputs, H and W pixels, L labels of a classifier, D features.
"""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.json_files import read_json
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

MAX_PIXELS = 1 << 24
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


@dataclass(frozen=True)
class Preparation:
    """The normalisation of images: side length, mean and deviation of each channel."""

    side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, folder: Path, side: int) -> Preparation:
        """Read the normalisation from preprocessor_config.json, if the base has one.

        Args:
            folder: The folder of the base.
            side: The side length of the model's images, in pixels.

        Returns:
            The normalisation.
        """
        path = folder / "preprocessor_config.json"
        stated = read_json(path) if path.is_file() else {}
        mean, deviation = stated.get("image_mean", cls.mean), stated.get("image_std", cls.deviation)
        return cls(side, tuple(map(float, mean)), tuple(map(float, deviation)))

    def pixels(self, text: str) -> Tensor:
        """Decode, resize and normalise an image.

        Args:
            text: A PNG or JPEG in base64.

        Returns:
            The pixels `[3, side, side]`, float32.

        Raises:
            UsageError: The text is not such an image, or the image is too large.
            HubError: Pillow is not installed.
        """
        try:
            from PIL import Image as pillow
            from PIL import UnidentifiedImageError
        except ImportError:
            raise HubError(
                "reading images needs Pillow", "run pip install 'experthub[vision]'"
            ) from None
        try:
            content = base64.b64decode(text.rpartition(",")[2], validate=True)
            with pillow.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UsageError(
                        f"an image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
                        "shrink the image",
                    )
                resized = image.convert("RGB").resize(
                    (self.side, self.side), pillow.Resampling.BICUBIC
                )
        except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
            raise UsageError(
                f"the input {text[:24]!r}... is not a PNG or JPEG in base64: {error}",
                "use a task with images for this base",
            ) from None
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(self.side, self.side, 3).permute(2, 0, 1).float() / 255
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (pixels - mean[:, None, None]) / deviation[:, None, None]


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
            model: The CLIP model.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: scaled cosines.
        """
        device = next(model.parameters()).device
        pixels = torch.stack([row.pixels for row in rows]).to(device)
        features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        image_ND = torch.nn.functional.normalize(features.float(), dim=-1)
        scale = model.logit_scale.detach().exp()
        return compare_with_heads(image_ND, [row.choices for row in rows], scale)

    @torch.no_grad()
    def _embed_choices(self, choices: Sequence[str]) -> Tensor:
        """Embed choices with the base; return the unit embeddings `[C, D]`."""
        model = self.base()
        texts = [f"a photo of a {choice}." for choice in choices]
        rows = [tokenise(self.tokenizer, text, self.window) for text in texts]
        device, token = next(model.parameters()).device, find_pad_token(model)
        ids, real = pad(rows, device, token=token)
        found = model.text_model(input_ids=ids, attention_mask=real.long()).pooler_output
        return torch.nn.functional.normalize(model.text_projection(found).float(), dim=-1)
