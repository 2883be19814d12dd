"""The preparation of images, as a base's configuration of its processor states it."""

from __future__ import annotations

import base64
import binascii
import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import LOCAL, explain_loading_errors, list_loading_errors
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.files.json_files import read_json
from torch import Tensor

CONFIG = "preprocessor_config.json"
MAX_PIXELS, MAX_SIDE = 1 << 24, 1 << 12
SIZES = ("size", "crop_size", "pad_size")
COLOURS = (0.5, 0.5, 0.5)
AGAIN = "get the file again from where the base was published"


@dataclass(frozen=True)
class Preparation:
    """A preparation of images: by transformers' own processor, or by a plain resize.

    Args:
        side: The side length of the model's images, in pixels.
        mean: The mean of each channel, which a plain resize subtracts.
        deviation: The deviation of each channel, by which a plain resize divides.
        processor: The image processor of transformers; None for a plain resize.
    """

    side: int
    mean: tuple[float, ...] = COLOURS
    deviation: tuple[float, ...] = COLOURS
    processor: Any = None

    @classmethod
    def of(cls, base: Base, side: int) -> Preparation:
        """Read preprocessor_config.json, if the base has one.

        A file that states no size, as some that were written by hand, only changes the colours.

        Args:
            base: The base.
            side: The side length of the model's images, in pixels.

        Returns:
            The preparation.

        Raises:
            IntegrityError: The file is damaged, or states images of too many pixels.
        """
        path = base.folder / CONFIG
        stated = read_json(path) if path.is_file() else {}
        if "size" in stated:
            _check_sizes(stated, f"{CONFIG} of {base.name}")
            from transformers import AutoImageProcessor

            with explain_loading_errors(base, list_loading_errors()):
                found = AutoImageProcessor.from_pretrained(base.folder, backend="pil", **LOCAL)
                _process(found, _import_pillow().new("RGB", (3, 2)))
            return cls(side, processor=found)
        mean, deviation = (
            _read_colours(stated, key, base.name) for key in ("image_mean", "image_std")
        )
        return cls(side, mean, deviation)

    def pixels(self, text: str) -> Tensor:
        """Decode, resize and normalise an image.

        Args:
            text: A PNG or JPEG in base64, with or without `data:image/...;base64,`.

        Returns:
            The pixels `[3, H, W]`, float32.

        Raises:
            UsageError: The text is not such an image, or the image is too large.
            HubError: Pillow is not installed.
        """
        image = _open_image(text)
        if self.processor is not None:
            return _process(self.processor, image)
        resized = image.resize((self.side, self.side), _import_pillow().Resampling.BICUBIC)
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(self.side, self.side, 3).permute(2, 0, 1).float() / 255
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (pixels - mean[:, None, None]) / deviation[:, None, None]


def _read_colours(stated: dict[str, Any], key: str, base: str) -> tuple[float, ...]:
    """Read the numbers of the three channels, of which a deviation is not 0."""
    try:
        found = tuple(map(float, stated.get(key, COLOURS)))
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(map(math.isfinite, found)) or (key == "image_std" and 0 in found):
        raise IntegrityError(
            f"{key} in {CONFIG} of {base} is {stated[key]!r}, and not a number for each channel",
            AGAIN,
        )
    return found


def _check_sizes(stated: dict[str, Any], where: str) -> None:
    """Refuse sizes for which an image would fill the memory."""
    for key in SIZES:
        sides = stated.get(key)
        for side in sides.values() if isinstance(sides, dict) else [sides]:
            if isinstance(side, int | float) and not 0 < side <= MAX_SIDE:
                raise IntegrityError(
                    f"{key} in {where} is {sides}, and the hub reads images of up to {MAX_SIDE} pixels",
                    AGAIN,
                )


def _process(processor: Any, image: Any) -> Tensor:
    """Let transformers make pixels `[3, H, W]` of an image."""
    (pixels,) = processor(images=image, return_tensors="pt")["pixel_values"]
    if pixels.ndim != 3 or len(pixels) != 3:
        raise UsageError(
            f"{type(processor).__name__} makes pixels of the shape {list(pixels.shape)}, and not of "
            "three channels, a height and a width",
            "use a base whose images are whole and in colour",
        )
    if not pixels.isfinite().all():
        raise IntegrityError(
            f"{type(processor).__name__} makes pixels that are not finite, by the values in {CONFIG}",
            AGAIN,
        )
    found: Tensor = pixels.float()
    return found


def _open_image(text: str) -> Any:
    """Decode a PNG or JPEG in base64."""
    pillow = _import_pillow()
    try:
        content = base64.b64decode(text.rpartition(",")[2], validate=True)
        with pillow.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UsageError(
                    f"an image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
                    "shrink the image",
                )
            return image.convert("RGB")
    # Of Pillow's own errors, UnidentifiedImageError is an OSError.
    except (binascii.Error, OSError, ValueError) as error:
        # The text of UnidentifiedImageError is the address of a buffer.
        why = "" if isinstance(error, pillow.UnidentifiedImageError) else f": {error}"
        raise UsageError(
            f"the input {text[:24]!r}... is not a PNG or JPEG in base64{why}",
            "use a task with images for this base",
        ) from None


def _import_pillow() -> Any:
    """Import Pillow's module of images, which is optional."""
    try:
        from PIL import Image
    except ImportError:
        raise HubError(
            "reading images needs Pillow", "run pip install 'experthub[vision]'"
        ) from None
    return Image
