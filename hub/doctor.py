"""What the hub finds around it: versions, room, registries, what is missing, and the next step."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from experthub.hub.bases.base_sources import is_here
from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.files.atomic import hub_home
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.transfer.remotes._hf_api import token_path
from experthub.hub.transfer.remotes._http import is_offline
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

SHOWN = ("torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface_hub")
LITTLE = 1 << 30  # bytes of free disk: less than a base and its conversion need
# Where `hub --install-completion` writes, below the user's home.
COMPLETIONS = {
    "bash": ".bash_completions/hub.sh",
    "zsh": ".zfunc/_hub",
    "fish": ".config/fish/completions/hub.fish",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    found: what there is, in words.  next: what to do about it, unless it is ok.  details: the same
    as found, as plain values.  A warning keeps some command from working here, or makes it fetch
    something first; a problem is an error wherever it is met.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    next: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def examine(file: Path | None = None, devices: bool = False) -> list[Check]:
    """Every check, in a fixed order; nothing is written, fetched or raised.

    file: a registry to look in before all others.  devices: import torch and ask it for them.
    """
    looks: list[Callable[[], Check]] = [_python, _experthub, _packages]
    looks += [_devices] if devices else []
    checks = [_look(look) for look in (*looks, _home, _disk, _leftovers)]
    try:
        registry = Registry.read(file)
    except (HubError, OSError) as error:
        checks.append(_problem("registry", error))
    else:
        checks += [_look(look, registry) for look in (_registry, _experts, _bases)]
    return [*checks, _look(_variables), _look(_completion)]


def _look(look: Callable[..., Check], *given: Registry) -> Check:
    try:
        return look(*given)
    except (HubError, OSError) as error:
        return _problem(look.__name__.strip("_"), error)


def _problem(name: str, error: HubError | OSError) -> Check:
    hint = (
        error.hint if isinstance(error, HubError) else "check the path, its permissions, the disk"
    )
    return Check(name, "problem", str(error), hint)


def _python() -> Check:
    version = platform.python_version()
    wanted = metadata.metadata("experthub")["Requires-Python"]
    details = {"version": version, "requires": wanted}
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "ok", version, details=details)
    return Check("python", "problem", version, f"use Python {wanted}", details)


def _experthub() -> Check:
    version, folder = metadata.version("experthub"), str(Path(__file__).parent)
    details = {"version": version, "folder": folder}
    return Check("experthub", "ok", f"{version} in {folder}", details=details)


def _packages() -> Check:
    """The packages that experthub requires, by their metadata: none is imported."""
    required = [Requirement(text) for text in metadata.requires("experthub") or ()]
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    ranges = {name: Requirement(name) for name in SHOWN} | {r.name: r for r in required}
    versions = {name: _version(name) for name in ranges}
    wrong = [name for name, wanted in ranges.items() if not _fits(versions[name], wanted)]
    if wrong:
        found = ", ".join(f"{name} {versions[name] or 'is missing'}" for name in wrong)
        install = shlex.join(["pip", "install", *(str(ranges[name]) for name in wrong)])
        return Check("packages", "problem", found, install, versions)
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN)
    return Check("packages", "ok", shown, details=versions)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str | None, wanted: Requirement) -> bool:
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def _devices() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("devices", "problem", f"torch: {error}", "install torch again")
    names = {"cpu": f"{torch.get_num_threads()} threads"}
    names |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    names |= {"mps": "Apple GPU"} if torch.backends.mps.is_available() else {}
    found = ", ".join(f"{device} ({name})" for device, name in names.items())
    return Check("devices", "ok", found, details=names)


def _home() -> Check:
    home, place = hub_home().absolute(), _existing()
    details = {"folder": str(home), "exists": home.exists(), "writable": os.access(place, os.W_OK)}
    if not place.is_dir():
        hint = "set HUB_HOME to a folder"
        return Check("home", "problem", f"{place} is not a folder", hint, details)
    if not details["writable"]:
        hint = "change its permissions, or set HUB_HOME to another folder"
        return Check("home", "problem", f"{place} cannot be written", hint, details)
    found = str(home) if home.exists() else f"{home}, made when it is first needed"
    return Check("home", "ok", found, details=details)


def _existing() -> Path:
    """HUB_HOME, or the nearest folder above it that exists."""
    home = hub_home().absolute()
    return next(place for place in (home, *home.parents) if place.exists())


def _disk() -> Check:
    """Free bytes, and those that the hub uses, by the folders of HUB_HOME."""
    used: Counter[str] = Counter()
    for path, size in _files():
        used[path.parts[0] if len(path.parts) > 1 else "other"] += size
    free = shutil.disk_usage(_existing()).free
    areas = ", ".join(f"{area} {_size(size)}" for area, size in used.most_common() if size > 5e4)
    found = f"{_size(free)} free, {_size(used.total())} used" + (f": {areas}" if areas else "")
    details = {"free": free, "used": dict(used)}
    if free >= LITTLE:
        return Check("disk", "ok", found, details=details)
    return Check("disk", "warning", found, "make room, or set HUB_HOME to a larger disk", details)


def _leftovers() -> Check:
    """What stopped commands left: downloads in partial/, drafts under hidden names elsewhere."""
    left: Counter[str] = Counter()
    for path, size in _files():
        hidden = [i for i, part in enumerate(path.parts) if part.startswith(".")]
        if path.parts[0] == "partial":
            left[str(path)] += size
        elif hidden:
            left[str(Path(*path.parts[: hidden[0] + 1]))] += size
    if not left:
        return Check("leftovers", "ok", "none")
    return Check(
        "leftovers",
        "warning",
        f"{_size(left.total())} of commands that were stopped, or still run: {_listed(list(left))}",
        "run the stopped command again: a download goes on; "
        f"if no command runs, all of it may be removed from {hub_home().absolute()}",
        dict(left),
    )


def _files() -> Iterator[tuple[Path, int]]:
    """Every file below HUB_HOME with its size; a file that vanishes meanwhile is none."""
    home = hub_home()
    for folder, _, names in os.walk(home):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                yield path.relative_to(home), path.lstat().st_size


def _registry(registry: Registry) -> Check:
    layers = [
        {
            "path": str(x.path if x.path.is_file() else x.folder),
            "experts": len(x.content.experts),
            "bases": len(x.content.bases),
        }
        for x in registry.layers
    ]
    found = f"{len(registry.experts())} experts and {len(registry.bases())} bases in "
    found += ", ".join(f"{layer['path']} ({layer['experts']})" for layer in layers)
    return Check("registry", "ok", found, details={"layers": layers})


def _experts(registry: Registry) -> Check:
    """Which experts are in the store, whole; their bytes are not hashed."""
    experts, store = registry.experts(), Store()
    missing, damaged = [], []
    for expert in experts:
        try:
            store.identity(expert.digest)
        except NotFoundError:
            missing.append(expert)
        except HubError as error:
            damaged.append((expert.reference, error))
    lost = [e.reference for e in missing if not _has_source(e)]
    near = [e.reference for e in missing if _has_source(e)]
    steps = [f"{reference}: {error.hint}" for reference, error in damaged[:1]]
    steps += [f"hub pull {_listed(near, ' ')}"] if near else []
    steps += [f"{_listed(lost)}: no source is here; find the folder, then hub add"] if lost else []
    found = f"{len(experts) - len(missing) - len(damaged)} of {len(experts)} in the store"
    found += f"; not in it: {_listed([e.reference for e in missing])}" if missing else ""
    found += "".join(f"; {reference}: {error.message}" for reference, error in damaged)
    details = {"known": len(experts), "missing": [e.reference for e in missing]}
    details |= {"without_source": lost, "damaged": [reference for reference, _ in damaged]}
    status: Any = "problem" if damaged else "warning" if missing else "ok"
    return Check("experts", status, found, "; ".join(steps), details)


def _has_source(expert: Expert) -> bool:
    """Whether one of the expert's sources is a folder that is here, or remote."""
    folders = [Reference.parse(source).folder for source in expert.sources]
    return any(folder is None or folder.is_dir() for folder in folders)


def _bases(registry: Registry) -> Check:
    """Which bases are here; those that an expert is for are missed."""
    here = {name: is_here(name, registry) for name in registry.bases()}
    needed = {registry.base(e.base)[0] for e in registry.experts() if registry.has_base(e.base)}
    missing = sorted(name for name in needed if not here[name])
    found = ", ".join(name if here[name] else f"{name} (not fetched)" for name in here) or "none"
    if not missing:
        return Check("bases", "ok", found, details=here)
    step = f"hub pull {_listed(missing, ' ')}"
    return Check(
        "bases", "warning", found, f"unset HUB_OFFLINE; {step}" if is_offline() else step, here
    )


def _variables() -> Check:
    """Which variables have an effect; their values are nobody's business."""
    is_set = {name: bool(os.environ.get(name)) for name in ("HUB_HOME", "HF_TOKEN", "HF_ENDPOINT")}
    is_set |= {"HUB_OFFLINE": is_offline(), "HUB_DEBUG": os.environ.get("HUB_DEBUG") == "1"}
    found = ", ".join(f"{name} {'set' if yes else 'not set'}" for name, yes in is_set.items())
    path = token_path()
    if path.is_file() and path.stat().st_mode & 0o077:
        found += f"; others can read {path}"
        return Check("variables", "warning", found, f"chmod 600 {path}", is_set)
    return Check("variables", "ok", found, details=is_set)


def _completion() -> Check:
    """Of the shells, those for which typer's script is where it installs it."""
    shells = [shell for shell, path in COMPLETIONS.items() if (Path.home() / path).is_file()]
    if shells:
        return Check("completion", "ok", ", ".join(shells), details={"shells": shells})
    step = "hub --install-completion, in the shell that is to have it"
    return Check("completion", "warning", "not installed", step, {"shells": []})


def _listed(names: list[str], between: str = ", ", most: int = 6) -> str:
    """The first of the names, and how many more there are."""
    more = [f"... ({len(names) - most} more)"] if len(names) > most else []
    return between.join([*names[:most], *more])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
