"""Create the tasks of the vision suite and its base, a small vision transformer trained from scratch.

Usage: python examples/suite/vision.py FOLDER

CIFAR-10 and MNIST come from BIG-bench, and digits from scikit-learn. Turned, inverted, noisy, blurred and
upside-down variants are separate tasks. The base is trained on plain CIFAR-10 and MNIST, with one head
for all labels, and is written to FOLDER. Existing tasks and an existing base are kept.
"""

from __future__ import annotations

import base64
import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from experthub.hub.readers.images import Preparation
from experthub.hub.session import Session
from experthub.hub.tasks import bigbench
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, tasks_folder, write_task
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import save_file
from torch import Tensor

SIDE, EXAMPLES = 32, 4000
OBJECTS = [
    *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
]
DIGITS = [str(n) for n in range(10)]
LABELS = [*OBJECTS, *DIGITS]
CHARACTERS = " .:-=+*#%@"  # characters of MNIST images as text, from ink to paper
Picture = Image.Image


def noisy(picture: Picture) -> Picture:
    """Blend an image with noise that is seeded by the image.

    Args:
        picture: The image.

    Returns:
        The noisy image.
    """
    chance = random.Random(picture.tobytes())
    noise = Image.frombytes("RGB", picture.size, chance.randbytes(len(picture.tobytes())))
    return Image.blend(picture, noise, 0.3)


VARIANTS: dict[str, Callable[[Picture], Picture]] = {
    "plain": lambda picture: picture,
    "turned": lambda picture: picture.rotate(90),
    "inverted": ImageOps.invert,
    "noisy": noisy,
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
    "upside-down": lambda picture: picture.rotate(180),
}
TASKS = {
    "cifar": ("plain", "turned", "inverted", "noisy", "upside-down"),
    "mnist": ("plain", "turned", "inverted", "noisy", "blurred"),
    "digits": ("plain", "inverted"),
}


def pictures(name: str) -> Iterator[tuple[Picture, str]]:
    """Iterate over the images of a dataset.

    Args:
        name: `cifar`, `mnist` or `digits`.

    Yields:
        An image and its label.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        for pixels, label in zip(found.images, found.target, strict=True):
            grey = torch.tensor(255 - pixels * 15.9).byte().numpy()
            yield Image.fromarray(grey).convert("RGB"), str(label)
        return
    wanted = {"cifar": "cifar10_classification/base64", "mnist": "mnist_ascii"}[name]
    for task, load, _ in bigbench._tasks(bigbench.fetch_archive(Session())):
        if task == wanted:
            # The examples are sampled, because the files are sorted by label.
            for item in random.Random(0).sample(load()["examples"], EXAMPLES):
                label = max(item["target_scores"], key=item["target_scores"].get)
                yield drawn(item["input"]), label
            return


def drawn(text: str) -> Picture:
    """Decode an image from base64, or from lines of characters.

    Args:
        text: The image as text.

    Returns:
        The image.
    """
    lines = [line for line in text.split("\n") if line]
    if len(lines) == 1:
        return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    step = 255 // (len(CHARACTERS) - 1)
    shades = [[max(0, CHARACTERS.find(c)) * step for c in line] for line in lines]
    return Image.fromarray(torch.tensor(shades).byte().numpy()).convert("RGB")


def in_base64(picture: Picture) -> str:
    """Encode an image as PNG in base64.

    Args:
        picture: The image.

    Returns:
        The text.
    """
    file = io.BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tasks() -> None:
    """Write every task that does not exist yet."""
    for name, variants in TASKS.items():
        missing = [v for v in variants if not (tasks_folder() / f"vision/{name}-{v}").is_dir()]
        found = list(pictures(name)) if missing else []
        labels = OBJECTS if name == "cifar" else DIGITS
        for variant in missing:
            examples = []
            for picture, label in found:
                text = in_base64(VARIANTS[variant](picture.resize((SIDE, SIDE))))
                made = example_id(text, labels)
                examples.append(
                    Example(id=made, input=text, choices=labels, answer=labels.index(label))
                )
            source = {"cifar": "cifar10", "mnist": "mnist", "digits": "digits"}[name]
            card = Card(name=f"{name}-{variant}", source=source, kind="labels", labels=labels)
            write_task("vision", card, examples)


def training_set() -> tuple[Tensor, Tensor]:
    """Return the pixels `[images, 3, 32, 32]` and the labels of plain CIFAR-10 and MNIST."""
    preparation = Preparation(SIDE)
    rows = [
        (
            preparation.pixels(example.input),
            LABELS.index((example.choices or [])[example.answer or 0]),
        )
        for name in ("cifar", "mnist")
        for example in read_task(f"vision:{name}-plain").split("train")
    ]
    return torch.stack([pixels for pixels, _ in rows]), torch.tensor([label for _, label in rows])


def train_base(folder: Path, epochs: int = 60, batch: int = 64) -> None:
    """Train the base and write it.

    Args:
        folder: The folder to create.
        epochs: The number of passes over the images.
        batch: The number of images per step.
    """
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = ViTConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        id2label=names,
        label2id={label: n for n, label in names.items()},
    )
    model: Any = ViTForImageClassification(config).train()
    pixels, labels = training_set()
    steps = epochs * (len(labels) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for epoch in range(epochs):
        order, total = torch.randperm(len(labels)), 0.0
        for rows in order.split(batch)[: len(labels) // batch]:
            logits = model(pixel_values=moved(pixels[rows])).logits
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        sys.stderr.write(
            f"epoch {epoch + 1} of {epochs}: loss {total / (len(labels) // batch):.3f}\n"
        )
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # The state dict keeps the names of the modules; transformers would write those of an older version.
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def moved(pixels: Tensor) -> Tensor:
    """Shift a batch by up to three pixels.

    Args:
        pixels: The images `[images, 3, 32, 32]`.

    Returns:
        The shifted images.
    """
    x, y = torch.randint(-3, 4, (2,)).tolist()
    return torch.roll(pixels, (x, y), (-2, -1))


if __name__ == "__main__":
    write_tasks()
    place = Path(sys.argv[1])
    if not (place / "model.safetensors").is_file():
        train_base(place)
