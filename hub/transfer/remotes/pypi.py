"""Files in Python packages, fetched from the package index that pip is configured to use."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from experthub.hub.errors import HubError, NotFoundError, UsageError
from experthub.hub.transfer.remotes._download import download
from experthub.hub.transfer.remotes._http import open_client, read_answer, redact_url
from experthub.hub.transfer.remotes._limits import Progress, check_online, ignore_progress

JSON_API = "application/vnd.pypi.simple.v1+json"
# The variables by which pip and Python find folders, besides pip's own. All others may be secret.
PIP_READS = {"HOME", "PATH", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "LANG", "LC_ALL", "TMPDIR"}
PIP_READS |= {"APPDATA", "LOCALAPPDATA", "PROGRAMDATA", "SYSTEMROOT", "TEMP", "USERPROFILE"}
IndexEntry = tuple[str, str, str, int | None]  # The name, the URL, the sha256 and the size.


@dataclass(frozen=True)
class PypiSource:
    """A parsed source `pypi:package==version#path/inside/wheel`.

    Args:
        package: The name of the package.
        version: The version of the package.
        member: The path of the file in the wheel.
    """

    package: str
    version: str
    member: str

    @classmethod
    def parse(cls, text: str) -> PypiSource:
        """Parse a source.

        Args:
            text: The source.

        Returns:
            The package, its version and the path in its wheel.

        Raises:
            UsageError: The text is not such a source.
        """
        found = re.fullmatch(r"pypi:([\w.-]+)==([\w.!+-]+)#(.+)", text)
        if not found or ".." in found.group(3).split("/") or found.group(3).startswith("/"):
            raise UsageError(
                f"{text[:200]!r} is not a source", "write pypi:package==version#path/in/wheel"
            )
        return cls(*found.groups())

    @classmethod
    def parse_parts(cls, text: str) -> list[PypiSource]:
        """Parse a source whose files are in several packages, joined by ` + `.

        Args:
            text: The source: parts of one weights file in their order, and licences beside it.

        Returns:
            The source of each file.

        Raises:
            UsageError: A part is not such a source.
        """
        return [cls.parse(part) for part in text.split(" + ")]


def find_index_url() -> str:
    """Find the package index that pip uses, by its files, environment and default.

    Only pip's help shows this. A wide terminal keeps the address on one line. Python runs isolated,
    so that no `pip.py` of the current folder or of PYTHONPATH takes the place of pip.

    Returns:
        The URL without a slash at the end.

    Raises:
        HubError: pip is missing, or its help does not show an index.
    """
    try:
        text = subprocess.run(
            [sys.executable, "-P", "-I", "-m", "pip", "download", "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=sys.prefix,
            env=_make_environment(),
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    found = re.search(r"--index-url <url>[^()]*\(default (\S+?)\)", text)
    if not found:
        raise HubError(
            "pip does not show which package index it uses", "install pip: python -m ensurepip"
        )
    return found.group(1).rstrip("/")


def _make_environment() -> dict[str, str]:
    """Make pip's environment: what says where its configuration is, and no token."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k in PIP_READS}
    if file := kept.get("PIP_CONFIG_FILE"):  # pip runs in another folder.
        kept["PIP_CONFIG_FILE"] = str(Path(file).absolute())
    return {**kept, "COLUMNS": "10000"}


def _parse_json_page(page: bytes, url: str) -> list[IndexEntry]:
    """List the files on a page of an index in JSON (PEP 691, with the sizes of PEP 700)."""
    try:
        return [
            (
                str(file["filename"]),
                str(file["url"]),
                str(file["hashes"].get("sha256", "")),
                size if type(size := file.get("size")) is int else None,
            )
            for file in json.loads(page)["files"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(
            f"{url} is not a list of files: {type(error).__name__}: {str(error)[:200]}",
            "check the package index that pip uses",
        ) from None


def _parse_html_page(page: str) -> Iterator[IndexEntry]:
    """Yield the files on a page of an index in HTML. The time grows linearly with the page."""
    for part in page.split("<a ")[1:]:
        tag, _, rest = part.partition(">")
        link = tag.partition('href="')[2].partition('"')[0]
        url, _, digest = link.partition("#sha256=")
        if digest.isalnum():
            yield rest.partition("<")[0].strip(), html.unescape(url), digest, None


def fetch(
    package: str,
    version: str,
    ending: str,
    folder: Path,
    progress: Progress = ignore_progress,
    sha256: str | None = None,
) -> Path:
    """Download a file of a package to `folder/<sha256>`.

    Args:
        package: The name of the package.
        version: The version.
        ending: The end of the file's name: `.whl` or `.tar.gz`.
        folder: The folder.
        progress: A progress callback.
        sha256: The sha256 that the file must have. The default is the one that the index states.

    Returns:
        The path of the file.

    Raises:
        HubError: The index does not answer, or states no sha256.
        NotFoundError: The index does not have the file.
        IntegrityError: The file has another sha256.
    """
    check_online(f"{package}=={version}")
    with open_client() as session:
        url = f"{find_index_url()}/{package}/"
        wanted = {"Accept": f"{JSON_API}, text/html;q=0.5"}
        answer, page = read_answer(session, url, redact_url(url), wanted)
    page_url = str(answer.url)
    if JSON_API in answer.headers.get("Content-Type", ""):
        files = _parse_json_page(page, redact_url(page_url))
    else:
        files = list(_parse_html_page(page.decode(errors="replace")))
    stem = re.escape(re.sub(r"[-_.]+", "-", package)).replace(r"\-", "[-_.]+")
    for name, url, digest, size in files:
        if re.fullmatch(rf"{stem}-{re.escape(version)}(-.*)?{re.escape(ending)}", name, re.I):
            if not digest:
                raise HubError(f"the package index has no sha256 of {name}", "use another index")
            place = urljoin(page_url, url)
            return download(place, sha256 or digest, folder, progress, size=size)
    raise NotFoundError(
        f"the package index has no {ending} file of {package}=={version}", "check the version"
    )
