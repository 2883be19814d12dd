"""Checks of the environment: versions, disk space, registries, missing content, and next steps."""

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

from experthub.hub.bases.base_sources import is_available_locally
from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.files.atomic import hub_home
from experthub.hub.plugins import load_plugins
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.transfer.remotes._hf_api import token_path
from experthub.hub.transfer.remotes._limits import is_offline
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

SHOWN = ("torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface_hub")
VARIABLES = ("HUB_HOME", "HUB_SAFE_FOLDERS", "HF_TOKEN", "HF_ENDPOINT")
LITTLE = 1 << 30  # Bytes of free disk space; a base and its conversion can need more.
# The files that `hub --install-completion` writes, relative to the user's home.
COMPLETIONS = {"bash": ".bash_completions/hub.sh", "zsh": ".zfunc/_hub"}
COMPLETIONS |= {"fish": ".config/fish/completions/hub.fish"}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: The name of the check.
        status: `problem` if commands fail because of it, `warning` if some commands do not work
            here or have to fetch something first, and `ok` otherwise.
        found: What was found, in words.
        next: What to do about it; empty if the status is `ok`.
        details: What was found, as plain values.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    next: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def examine(file: Path | None = None, devices: bool = False) -> list[Check]:
    """Run all checks in a fixed order, without writing, fetching or raising anything.

    Args:
        file: A registry file that is searched before all others.
        devices: Import torch and list its devices, too.

    Returns:
        The results.
    """
    first: list[Callable[[], Check]] = [_check_python, _check_experthub, _check_packages]
    first += [_check_plugins, *([_check_devices] if devices else [])]
    checks = [_run(check) for check in (*first, _check_home, _check_disk, _check_leftovers)]
    try:
        registry = Registry.read(file)
    except (HubError, OSError) as error:
        checks.append(_report_error("registry", error))
    else:
        checks += [_run(c, registry) for c in (_check_registry, _check_experts, _check_bases)]
    return [*checks, _run(_check_variables), _run(_check_completion)]


def _run(check: Callable[..., Check], *given: Registry) -> Check:
    """Run a check, and report an error that it raises as a problem."""
    try:
        return check(*given)
    except (HubError, ImportError, OSError) as error:
        return _report_error(check.__name__.removeprefix("_check_"), error)


def _report_error(name: str, error: Exception) -> Check:
    """Make a problem of an error."""
    hint = getattr(error, "hint", "") or "check the path, its permissions and the disk"
    return Check(name, "problem", str(error), hint)


def _check_python() -> Check:
    """Check the version of Python."""
    version, wanted = platform.python_version(), metadata.metadata("experthub")["Requires-Python"]
    details = {"version": version, "requires": wanted}
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "ok", version, details=details)
    return Check("python", "problem", version, f"use Python {wanted}", details)


def _check_experthub() -> Check:
    """Report the version and the folder of this package."""
    version, folder = metadata.version("experthub"), str(Path(__file__).parent)
    details = {"version": version, "folder": folder}
    return Check("experthub", "ok", f"{version} in {folder}", details=details)


def _check_packages() -> Check:
    """Check the versions of the required packages by their metadata, without importing any."""
    required = [Requirement(text) for text in metadata.requires("experthub") or ()]
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    ranges = {name: Requirement(name) for name in SHOWN} | {r.name: r for r in required}
    versions = {name: _find_version(name) for name in ranges}
    fits = {n: v and ranges[n].specifier.contains(v, prereleases=True) for n, v in versions.items()}
    wrong = [name for name in fits if not fits[name]]
    if wrong:
        found = ", ".join(f"{name} {versions[name] or 'is missing'}" for name in wrong)
        install = shlex.join(["pip", "install", *(str(ranges[name]) for name in wrong)])
        return Check("packages", "problem", found, f"run {install}", versions)
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN)
    return Check("packages", "ok", shown, details=versions)


def _find_version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _check_plugins() -> Check:
    """Load the kinds, merges and routers of other packages."""
    return Check("plugins", "ok", ", ".join(load_plugins()) or "none")


def _check_devices() -> Check:
    """List the devices that torch can use."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("devices", "problem", f"torch: {error}", "install torch again")
    names = {"cpu": f"{torch.get_num_threads()} threads"}
    names |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    names |= {"mps": "Apple GPU"} if torch.backends.mps.is_available() else {}
    found = ", ".join(f"{device} ({name})" for device, name in names.items())
    return Check("devices", "ok", found, details=names)


def _check_home() -> Check:
    """Check that HUB_HOME is a folder that can be written, or can be created."""
    home, place = hub_home().absolute(), _find_existing_folder()
    details = {"folder": str(home), "exists": home.exists(), "writable": os.access(place, os.W_OK)}
    if not place.is_dir():
        hint = "set HUB_HOME to a folder"
        return Check("home", "problem", f"{place} is not a folder", hint, details)
    if not details["writable"]:
        hint = "change its permissions, or set HUB_HOME to another folder"
        return Check("home", "problem", f"{place} cannot be written", hint, details)
    found = str(home) if home.exists() else f"{home}; the first command that needs it creates it"
    return Check("home", "ok", found, details=details)


def _find_existing_folder() -> Path:
    """Return HUB_HOME, or the nearest folder above it that exists."""
    home = hub_home().absolute()
    return next(place for place in (home, *home.parents) if place.exists())


def _check_disk() -> Check:
    """Report the free disk space, and the space that each folder of HUB_HOME takes."""
    used: Counter[str] = Counter()
    for path, size in _list_files():
        used[path.parts[0] if len(path.parts) > 1 else "other"] += size
    free = shutil.disk_usage(_find_existing_folder()).free
    areas = [f"{area} {_format_size(size)}" for area, size in used.most_common() if size > 5e4]
    found = f"{_format_size(free)} free, {_format_size(used.total())} used"
    found += f": {', '.join(areas)}" if areas else ""
    step = "" if free >= LITTLE else "free space, or set HUB_HOME to a larger disk"
    details = {"free": free, "used": dict(used)}
    return Check("disk", "warning" if step else "ok", found, step, details)


def _check_leftovers() -> Check:
    """Find files of interrupted commands: downloads in partial/, and drafts with hidden names."""
    left: Counter[str] = Counter()
    for path, size in _list_files():
        hidden = [i for i, part in enumerate(path.parts) if part.startswith(".")]
        if path.parts[0] == "partial":
            left[str(path)] += size
        elif hidden:
            left[str(Path(*path.parts[: hidden[0] + 1]))] += size
    if not left:
        return Check("leftovers", "ok", "none")
    found = f"{_format_size(left.total())} of interrupted or running commands: {_join(list(left))}"
    step = "run the interrupted command again to continue its download; if no command is running, "
    step += f"these files can be deleted from {hub_home().absolute()}"
    return Check("leftovers", "warning", found, step, dict(left))


def _list_files() -> Iterator[tuple[Path, int]]:
    """Yield the files below HUB_HOME and their sizes, without those that vanish meanwhile."""
    home = hub_home()
    for folder, _, names in os.walk(home):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                yield path.relative_to(home), path.lstat().st_size


def _check_registry(registry: Registry) -> Check:
    """Report the layers of the registry."""
    layers = []
    for layer in registry.layers:
        path = str(layer.path if layer.path.is_file() else layer.folder)
        experts, bases = len(layer.content.experts), len(layer.content.bases)
        layers.append({"path": path, "experts": experts, "bases": bases})
    found = f"{len(registry.list_experts())} experts and {len(registry.list_bases())} bases in "
    found += ", ".join(f"{row['path']} ({row['experts']})" for row in layers)
    return Check("registry", "ok", found, details={"layers": layers})


def _check_experts(registry: Registry) -> Check:
    """Check which experts are complete in the store, without hashing their files."""
    experts, store = registry.list_experts(), Store()
    missing, damaged = [], []
    for expert in experts:
        try:
            store.read_identity(expert.digest)
        except NotFoundError:
            missing.append(expert)
        except HubError as error:
            damaged.append((expert.reference, error))
    lost = [e.reference for e in missing if not _has_source(e)]
    near = [e.reference for e in missing if _has_source(e)]
    steps = [f"{reference}: {error.hint}" for reference, error in damaged[:1]]
    steps += [f"run hub pull {' '.join(near)}"] if near else []
    if lost:
        steps.append(f"find the folder of {_join(lost)}, which has no source, and run hub add")
    found = f"{len(experts) - len(missing) - len(damaged)} of {len(experts)} in the store"
    found += f"; missing: {_join([e.reference for e in missing])}" if missing else ""
    found += "".join(f"; {reference}: {error.message}" for reference, error in damaged)
    details = {"known": len(experts), "missing": [e.reference for e in missing]}
    details |= {"without_source": lost, "damaged": [reference for reference, _ in damaged]}
    status: Any = "problem" if damaged else "warning" if missing else "ok"
    return Check("experts", status, found, "; ".join(steps), details)


def _has_source(expert: Expert) -> bool:
    """Return true if one of the expert's sources is remote, or a folder that exists here."""
    folders = [Reference.parse(source).folder for source in expert.sources]
    return any(folder is None or folder.is_dir() for folder in folders)


def _check_bases(registry: Registry) -> Check:
    """Check which bases are here; only those that an expert needs can be missing."""
    here = {name: is_available_locally(name, registry) for name in registry.list_bases()}
    needed = {
        registry.find_base(e.base)[0] for e in registry.list_experts() if registry.has_base(e.base)
    }
    missing = sorted(name for name in needed if not here[name])
    found = ", ".join(name if here[name] else f"{name} (not fetched)" for name in here) or "none"
    if not missing:
        return Check("bases", "ok", found, details=here)
    step = f"{'unset HUB_OFFLINE, and ' if is_offline() else ''}run hub pull {' '.join(missing)}"
    return Check("bases", "warning", found, step, here)


def _check_variables() -> Check:
    """Report which environment variables are set, without their values, which may be secret."""
    is_set = {name: bool(os.environ.get(name)) for name in VARIABLES}
    is_set |= {"HUB_OFFLINE": is_offline(), "HUB_DEBUG": os.environ.get("HUB_DEBUG") == "1"}
    found = ", ".join(f"{name} {'set' if yes else 'not set'}" for name, yes in is_set.items())
    path = token_path()
    if path.is_file() and path.stat().st_mode & 0o077:
        found += f"; other users can read {path}"
        return Check("variables", "warning", found, f"run chmod 600 {path}", is_set)
    return Check("variables", "ok", found, details=is_set)


def _check_completion() -> Check:
    """Report the shells for which typer has installed its completion script."""
    shells = [shell for shell, path in COMPLETIONS.items() if (Path.home() / path).is_file()]
    if shells:
        return Check("completion", "ok", ", ".join(shells), details={"shells": shells})
    step = "run hub --install-completion in the shell that you use"
    return Check("completion", "warning", "not installed", step, {"shells": []})


def _join(names: list[str], most: int = 6) -> str:
    """Join the first names, and count the others."""
    more = [f"... ({len(names) - most} more)"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _format_size(count: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
