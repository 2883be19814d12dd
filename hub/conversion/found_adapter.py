"""Finding adapters of any known format in a folder; only names, JSON and headers are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG, GATES
from experthub.hub.formats.dense_parts import FACTOR
from experthub.hub.formats.lora_config import is_plain_init
from experthub.hub.formats.safetensors_header import read_header, read_header_text
from experthub.hub.kinds import kinds
from experthub.hub.kinds.kind import PICKLES

MLX_WEIGHTS = "adapters.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
OWN = {ADAPTER, ADAPTER_CONFIG, GATES}
# Segments that wrappers of torch, FSDP and DeepSpeed leave in names.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
MAX_SUBFOLDERS = 1000  # Sub-folders that are searched.
FORMATS = {
    "peft": "peft",
    "mlx": "MLX",
    "kohya": "kohya or LyCORIS",
    "diffusers": "diffusers",
    "gguf": "GGUF",
    "pickle": "a pickle of torch",
    "hub": "the hub's own format",
}


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter in a folder.

    Args:
        folder: The folder.
        weights: The file with its tensors.
        format: A key of `FORMATS`.
        config: The content of its `adapter_config.json`; empty without that file.
    """

    folder: Path
    weights: Path
    format: str
    config: dict[str, Any]

    @property
    def place(self) -> Path:
        """The path that finds this adapter again: its folder, or its file without a configuration."""
        return self.folder if self.config or self.format == "hub" else self.weights

    @property
    def is_native(self) -> bool:
        """True if the hub can read the files as they are, or refuse them with their true reason."""
        if self.format == "hub":
            return True
        config = self.config
        if self.format != "peft" or config.get("peft_type", "LORA") != "LORA":
            return False
        if config.get("use_dora"):
            return False
        if self.weights.name != ADAPTER:
            return False
        if "peft_type" not in config or not is_plain_init(config.get("init_lora_weights")):
            return False
        header = read_header(self.weights)
        if any(not WRAPPERS.isdisjoint(name.split(".")) for name in header):
            return False
        names = [name for name in header if "lora_" in name]
        factors = [name for name in names if not name.endswith(".lora_B.bias")]
        return all(map(FACTOR.fullmatch, factors))  # Without any, its own error is the best.


def find_adapter(place: Path, subfolder: str = "") -> FoundAdapter:
    """Find the one adapter at a place.

    Args:
        place: A folder or a file.
        subfolder: The sub-folder that holds the adapter, if the folder holds several.

    Returns:
        The adapter.

    Raises:
        NotFoundError: There is no such folder, or no adapter in it.
        IntegrityError: The folder holds no adapter.
        HubError: The folder holds several adapters, and none is chosen.
    """
    if subfolder:
        chosen = place / subfolder
        if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts or not chosen.is_dir():
            inside = ", ".join(_name_folders(place)) or "none"
            raise NotFoundError(
                f"{place} has no adapter in {subfolder!r}", f"choose one of its adapters: {inside}"
            )
        place = chosen
    if not place.exists():
        raise NotFoundError(f"there is no folder {place}", "name the folder that holds the adapter")
    found = _recognise_file(place) if place.is_file() else _recognise_folder(place)
    if found is not None:
        return found
    inner = find_in_subfolders(place) if place.is_dir() else []
    if len(inner) == 1:
        return inner[0]
    if inner:
        names = ", ".join(str(one.folder.relative_to(place)) for one in inner)
        raise HubError(
            f"{place} holds {len(inner)} adapters: {names}",
            f"choose one with --subfolder, or name its folder: {inner[0].folder}",
        )
    if place.is_dir():
        kinds.recognise(place)  # Its error names what a folder needs.
    raise NotFoundError(
        f"there is no folder {place}, and no adapter in it",
        "name a safetensors or GGUF file, or the folder that the training wrote",
    )


def find_in_subfolders(place: Path) -> list[FoundAdapter]:
    """Find the adapters below a folder, such as those that peft saves under their names.

    Folders of checkpoints are omitted if the folder has other adapters.

    Args:
        place: The folder.

    Returns:
        The adapters, sorted by path.
    """
    folders = [*sorted(place.glob("*/")), *sorted(place.glob("*/*/"))]
    found = [_recognise_folder(path) for path in folders[:MAX_SUBFOLDERS] if not path.is_symlink()]
    adapters = [one for one in found if one is not None]
    others = [a for a in adapters if not a.folder.name.startswith("checkpoint-")]
    return others or adapters


def _name_folders(place: Path) -> list[str]:
    """List the sub-folders of a folder that hold adapters."""
    return [str(one.folder.relative_to(place)) for one in find_in_subfolders(place)]


def _recognise_folder(folder: Path) -> FoundAdapter | None:
    """Return the adapter whose files are in this folder itself."""
    # Under a name of the hub's own, a pipe or a device is refused where the file is read.
    names = {path.name for path in folder.iterdir() if path.is_file() or path.name in OWN}
    config = read_json(folder / ADAPTER_CONFIG) if ADAPTER_CONFIG in names else {}
    is_mlx = "lora_parameters" in config or "fine_tune_type" in config
    if MLX_WEIGHTS in names and (is_mlx or ADAPTER not in names):
        return FoundAdapter(folder, folder / MLX_WEIGHTS, "mlx", config)
    if ADAPTER in names:
        return FoundAdapter(folder, folder / ADAPTER, "peft", config)
    if any(names.intersection(kind.marks) for kind in kinds.values()):
        return FoundAdapter(folder, folder, "hub", config)
    if DIFFUSERS_WEIGHTS in names:
        return FoundAdapter(folder, folder / DIFFUSERS_WEIGHTS, "diffusers", config)
    names -= OWN  # Gates alone are no adapter.
    files = sorted(name for name in names if name.endswith((".safetensors", ".gguf", *PICKLES)))
    pickles = [name for name in files if name.endswith(PICKLES)]
    if config and "adapter_model.bin" in names:
        return FoundAdapter(folder, folder / "adapter_model.bin", "pickle", config)
    if "config.json" in names:  # A model, which is not an adapter.
        return None
    others = [name for name in files if name not in pickles]
    for name in others if len(others) == 1 else pickles if len(pickles) == 1 else ():
        found = _recognise_file(folder / name)
        return found and FoundAdapter(folder, found.weights, found.format, config or found.config)
    return None


def _recognise_file(path: Path) -> FoundAdapter | None:
    """Return the adapter in one file; its configuration may be in the file's metadata."""
    if path.suffix == ".gguf":
        return FoundAdapter(path.parent, path, "gguf", {})
    if path.suffix in PICKLES:
        beside = path.parent / ADAPTER_CONFIG
        return FoundAdapter(
            path.parent, path, "pickle", read_json(beside) if beside.is_file() else {}
        )
    if path.suffix != ".safetensors":
        return None
    beside = path.parent / ADAPTER_CONFIG
    config = read_json(beside) if beside.is_file() else {}
    return FoundAdapter(path.parent, path, _name_format(path), config)


def _name_format(path: Path) -> str:
    """Tell the format of a safetensors file by the names of its tensors."""
    names, metadata = list(read_header(path)), read_metadata(path)
    if any(key.startswith("ss_") for key in metadata) or any(
        name.startswith(("lora_unet_", "lora_te", "lycoris_")) or ".lora_down." in name
        for name in names
    ):
        return "kohya"
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        return "mlx"
    if any(
        name.startswith(("unet.", "text_encoder", "transformer.transformer_")) for name in names
    ):
        return "diffusers"
    return "peft"


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Args:
        path: The file.

    Returns:
        Texts by key.
    """
    read_header(path)
    found = json.loads(read_header_text(path)[0]).get("__metadata__", {})
    return found if isinstance(found, dict) else {}
