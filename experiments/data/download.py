"""Fetch a file over HTTPS, resuming where an earlier attempt stopped, and unpack what is wanted of a tar archive."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

CHUNK_SIZE = 1 << 18
# A full disk is an OSError too, and no trouble of the network: hence the list.
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)


def download(url: str, target: Path, *, md5: str, timeout: float = 30.0) -> Path:
    """Fetch ``url`` into ``target``, which appears only once it is complete and its checksum is right.

    Until then the bytes are in ``<target>.part``.  An attempt that finds this file asks the server for the rest of it;
    a server that cannot resume sends everything again.  A ``target`` that is there already, say fetched by hand, is
    checked and not fetched.  On a terminal a progress bar is drawn.  One process at a time.

    Arguments:
        url: Where the file is; https only.
        target: Where it goes.  Missing parent folders are made.
        md5: Its checksum in hexadecimal, as the publisher states it.
        timeout: Seconds to wait for the connection, and for each piece of data after it.

    Returns:
        ``target``.

    Raises:
        ValueError: The URL is not https, or the checksum is wrong; a ``.part`` file with a wrong checksum is deleted.
        ConnectionError: No connection, an HTTP error, a timeout, or a cut; what has arrived is kept for the next try.
    """
    if urlsplit(url).scheme != "https":
        raise ValueError(f"only https:// URLs are fetched, got {url}.")
    return _fetch(url, target, md5=md5, timeout=timeout)


def extract(archive: Path, folder: Path, names: Collection[str]) -> None:
    """Unpack the members ``<folder.name>/<name>`` of a tar archive into ``folder``: all of them, and nothing else.

    The folder appears when it is complete, so an interruption leaves no half of it.

    Raises:
        ValueError: The archive lacks one of the members.
    """
    wanted = {f"{folder.name}/{name}" for name in names}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tarfile.open(archive) as tar:
        members = [member for member in tar if member.name in wanted]
        missing = wanted - {member.name for member in members}
        if missing:
            raise ValueError(f"{archive} has no {', '.join(sorted(missing))}: it is not the archive asked for.")
        tar.extractall(temporary, members, filter="data")
        (Path(temporary) / folder.name).replace(folder)


def _fetch(url: str, target: Path, *, md5: str, timeout: float = 30.0) -> Path:
    """What `download` does, for any scheme."""
    if target.exists():
        _check(target, md5)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        _transfer(url, part, timeout)
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"could not download {url}: {error}.  Run again to resume, or fetch it by hand and save it as {target}."
        ) from error
    try:
        _check(part, md5)
    except ValueError:
        part.unlink()
        raise
    return part.replace(target)


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Append to ``part`` what it lacks of ``url``."""
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if offset and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing comes after the offset: the part is complete
            raise
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            offset = 0  # the server ignores ranges and sends the whole file
        length = response.headers["Content-Length"]
        total = None if length is None else offset + int(length)
        with part.open("ab" if offset else "wb") as file, _progress() as progress:
            task = progress.add_task(part.stem, total=total, completed=offset)
            while chunk := response.read(CHUNK_SIZE):
                file.write(chunk)
                progress.advance(task, len(chunk))
            size = file.tell()
    # A sized read reports a cut as the end of the file.
    if total is not None and size < total:
        raise ConnectionError(f"the connection was cut after {size} of {total} bytes")


def _check(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if got != md5:
        raise ValueError(
            f"{path} has md5 {got}, expected {md5}: it is damaged or another file.  Start over with a fresh copy."
        )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty())
