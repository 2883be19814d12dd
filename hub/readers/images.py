"""Readers of images: classifiers by their own heads, CLIP by heads of the choices' text.

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
from experthub.hub.readers.reader import by_row, padded, selected
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.text import columns_of
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

MAX_PIXELS = 1 << 24
SHIFT, NOISE = 0.07, 0.05  # of a variation: share of the width, and of a pixel's deviation


@dataclass(frozen=True, eq=False)
class Image:
    """Pixels `[3, H, W]` as the model wants them.  choices: what the logits are over."""

    pixels: Tensor
    choices: Any
    size = 1

    def varied(self, seed: int) -> Image:
        """Moved by some pixels, and with noise; not mirrored, which would change letters."""
        own = zlib.crc32(self.pixels.numpy().tobytes(), seed & 0xFFFFFFFF)
        random = torch.Generator().manual_seed(own)
        limit = max(1, round(SHIFT * self.pixels.shape[-1]))
        moves = torch.randint(-limit, limit + 1, (2,), generator=random).tolist()
        moved = torch.roll(self.pixels, moves, (-2, -1))
        noise = torch.randn(self.pixels.shape, generator=random)
        return replace(self, pixels=moved + NOISE * noise)


@dataclass(frozen=True)
class Preparation:
    """How an image becomes pixels: side length, mean and deviation of each channel."""

    side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, folder: Path, side: int) -> Preparation:
        """As preprocessor_config.json says, if there is one."""
        path = folder / "preprocessor_config.json"
        stated = read_json(path) if path.is_file() else {}
        mean, deviation = stated.get("image_mean", cls.mean), stated.get("image_std", cls.deviation)
        return cls(side, tuple(map(float, mean)), tuple(map(float, deviation)))

    def pixels(self, text: str) -> Tensor:
        """Pixels `[3, side, side]` of an image in base64; UsageError for what is none."""
        try:
            from PIL import Image as pillow
            from PIL import UnidentifiedImageError
        except ImportError:
            raise HubError(
                "reading images needs Pillow", "pip install 'experthub[vision]'"
            ) from None
        try:
            content = base64.b64decode(text.rpartition(",")[2], validate=True)
            with pillow.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UsageError(
                        f"an image has {image.width} x {image.height} pixels", "shrink it"
                    )
                resized = image.convert("RGB").resize(
                    (self.side, self.side), pillow.Resampling.BICUBIC
                )
        except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
            raise UsageError(
                f"the input {text[:24]!r}... is no PNG or JPEG in base64: {error}",
                "use a task of images with this base",
            ) from None
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(self.side, self.side, 3).permute(2, 0, 1).float() / 255
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (pixels - mean[:, None, None]) / deviation[:, None, None]


class ImageClassifier:
    """A classifier of images: its own frozen head, at the labels that are a question's choices."""

    name = "classifier-logits"
    real: Tensor | None = None

    def __init__(self, preparation: Preparation, labels: dict[str, int]) -> None:
        self.preparation, self.labels = preparation, labels

    def question(self, task: Task, example: Example) -> Question:
        return Question(example.input, tuple(task.choices(example)))

    def row(self, question: Question) -> Image:
        pixels = self.preparation.pixels(question.text)
        return Image(pixels, columns_of(question.choices, self.labels))

    def read(self, model: Any, rows: Sequence[Image]) -> Tensor:
        device = next(model.parameters()).device
        logits_NL = model(pixel_values=torch.stack([row.pixels for row in rows]).to(device)).logits
        return selected(logits_NL.float(), [row.choices for row in rows])


class Clip:
    """CLIP: the scaled cosines with the choices' text by the base, frozen (Radford et al.,
    https://arxiv.org/abs/2103.00020, section 3.1.2)."""

    name = "clip-cosine"
    real: Tensor | None = None

    def __init__(self, preparation: Preparation, tokenizer: Any, base: Callable[[], Any]) -> None:
        """base: gives the model that makes the heads, whatever model reads the images."""
        self.preparation, self.tokenizer, self.base = preparation, tokenizer, base
        self._heads: dict[str, Tensor] = {}

    def question(self, task: Task, example: Example) -> Question:
        return Question(example.input, tuple(task.choices(example)))

    def row(self, question: Question) -> Image:
        return Image(self.preparation.pixels(question.text), self._heads_of(question.choices))

    def read(self, model: Any, rows: Sequence[Image]) -> Tensor:
        device = next(model.parameters()).device
        pixels = torch.stack([row.pixels for row in rows]).to(device)
        features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        image_ND = torch.nn.functional.normalize(features.float(), dim=-1)
        heads_CD = torch.cat([row.choices for row in rows]).to(image_ND)
        counts = [len(row.choices) for row in rows]
        owner = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=device)
        scale = model.logit_scale.detach().exp()
        return by_row(scale * (heads_CD * image_ND[owner]).sum(1), counts)

    @torch.no_grad()
    def _heads_of(self, choices: Sequence[str]) -> Tensor:
        new = [choice for choice in choices if choice not in self._heads]
        if new:
            model = self.base()
            texts = [f"a photo of a {choice}." for choice in new]
            ids, real = padded(self.tokenizer(texts)["input_ids"], next(model.parameters()).device)
            found = model.text_model(input_ids=ids, attention_mask=real.long()).pooler_output
            rows = torch.nn.functional.normalize(model.text_projection(found).float(), dim=-1)
            self._heads |= dict(zip(new, rows, strict=True))
        return torch.stack([self._heads[choice] for choice in choices])
