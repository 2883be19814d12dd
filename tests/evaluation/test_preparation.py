"""Images become the pixels that transformers makes of them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from experthub.hub.bases.base import Base, read
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.readers.preparation import Preparation

pytest.importorskip("PIL")
GREY = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# As the configurations of published models state it, with smaller images.
PUBLISHED: dict[str, dict[str, Any]] = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "resample": 3}
    | {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    | {"image_mean": [0.481, 0.457, 0.408], "image_std": [0.268, 0.261, 0.275]},
    "clip, old": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16}
    | GREY,
    "vit": {"image_processor_type": "ViTImageProcessor", "resample": 2}
    | {"size": {"height": 16, "width": 16}, **GREY},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "resample": 3}
    | {"size": {"height": 16, "width": 16}, **GREY},
    "dinov2": {"image_processor_type": "BitImageProcessor", "resample": 3}
    | {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, **GREY},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875}
    | {"size": {"shortest_edge": 16}, "resample": 3, **GREY},
    "without colours": {"image_processor_type": "ViTImageProcessor", "do_normalize": False}
    | {"size": {"height": 16, "width": 16}},
}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return read(ARCHITECTURES["clip"].save(tmp_path / "base"), "base")


def write(base: Base, stated: object) -> Preparation:
    (base.folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return Preparation.of(base, 16)


def draw(width: int = 31, height: int = 22) -> tuple[str, Any]:
    """Draw noise; return it in base64 and as an image."""
    from PIL import Image

    pixels = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8)
    image = Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode(), image


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_pixels_are_those_of_transformers(name: str, base: Base) -> None:
    from transformers import AutoImageProcessor

    preparation = write(base, PUBLISHED[name])
    processor = AutoImageProcessor.from_pretrained(base.folder, backend="pil")
    plain = Preparation(16)
    for size in ((31, 22), (16, 16), (9, 40)):
        text, image = draw(*size)
        wanted = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(preparation.pixels(text), wanted.float())
        assert wanted.shape == (3, 16, 16)
        if name in ("clip", "dinov2", "without colours"):  # The others only resize.
            assert not torch.allclose(plain.pixels(text), wanted.float(), atol=0.01)


def test_a_file_without_a_size_states_the_colours(base: Base) -> None:
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]}
    text, _ = draw()
    plain = Preparation(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).pixels(text)
    found = write(base, colours).pixels(f"data:image/png;base64,{text}")
    assert found.shape == (3, 16, 16) and float(plain.min()) >= 0 and float(plain.max()) <= 1
    for channel in range(3):
        wanted = (plain[channel] - colours["image_mean"][channel]) / colours["image_std"][channel]
        torch.testing.assert_close(found[channel], wanted)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": 10**9},
        {"size": {"shortest_edge": 16}, "crop_size": 10**9},
        {"size": {"height": 0, "width": 0}},
        {"size": -1},
        {"size": "large"},
        {"size": [16]},
        {"size": None},
        {"size": {"depth": 3}},
        {"size": 16, "image_processor_type": "NoSuchProcessor"},
        {"size": 16, "image_processor_type": "CLIPTokenizer"},
        {"size": 16, "image_processor_type": 7},
        {"size": 16, "auto_map": {"AutoImageProcessor": "code.Mine"}},
        {"size": 16, "resample": 99},
        {"size": 16, "resample": "x"},
        {"size": 16, "image_mean": ["x"]},
        {"size": 16, "image_mean": [0.5]},
        {"size": 16, "image_std": 0},
        {"size": 16, "rescale_factor": "x"},
        {"image_mean": "grey"},
        {"image_std": [{}]},
        {"image_std": [0, 0, 0]},
        {"image_mean": [float("nan")] * 3},
    ],
    ids=repr,
)
def test_wrong_values_are_one_error_or_harmless(wrong: dict[str, Any], base: Base) -> None:
    try:
        pixels = write(base, wrong).pixels(draw()[0])
    except HubError as error:
        assert ("base" in error.message or "preprocessor" in error.message) and error.hint
    else:
        assert pixels.shape[0] == 3 and pixels.ndim == 3 and pixels.isfinite().all()


def test_images_that_would_fill_the_memory_are_refused(base: Base) -> None:
    with pytest.raises(IntegrityError, match=r"crop_size in preprocessor_config\.json of base"):
        write(base, {"size": 16, "crop_size": {"height": 16, "width": 10**9}})


@pytest.mark.parametrize("text", ["no image", "aGVsbG8=", "", "!!!!"])
def test_what_is_no_image_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a PNG or JPEG in base64"):
        Preparation(8).pixels(text)


def test_an_image_of_too_many_pixels() -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")
    with pytest.raises(UsageError, match="8000 x 8000 pixels"):
        Preparation(8).pixels(base64.b64encode(file.getvalue()).decode())
