"""Download a file over HTTPS, resuming interrupted attempts, and unpack chosen members of a tar archive."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

CHUNK_SIZE = 1 << 18
MOST_BYTES = 1 << 30  # of a download, unless the caller sets another limit
MOST_URL = 100  # characters of an address in an error
# Not simply OSError, which a full disk raises, too.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


def download(url: str, target: Path, *, md5: str, timeout: float = 30.0, most: int = MOST_BYTES) -> Path:
    """Download ``url`` to ``target``; returns ``target``.

    Incomplete data is kept in ``<target>.part``; the next attempt resumes from this file if the server supports it.  If
    ``target`` exists, only its md5 is checked.  Only one process at a time may download a file.  ``timeout`` is the
    number of seconds to wait for the connection and for each piece of data.  ``most``: the largest size in bytes.

    Raises:
        ValueError: The URL is not https, the file is too large, or the md5 is wrong.  Such a ``.part`` file is deleted.
        ConnectionError: The connection failed, timed out or was cut, or the server returned an error.
    """
    if urlsplit(url).scheme != "https":
        raise ValueError(f"The URL must begin with https://, got {url}.")
    return _fetch(url, target, md5=md5, timeout=timeout, most=most)


def extract(archive: Path, folder: Path, names: Collection[str]) -> None:
    """Unpack the members ``<folder.name>/<name>`` of a tar archive into ``folder``, which is created atomically."""
    wanted = {f"{folder.name}/{name}" for name in names}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tarfile.open(archive) as tar:
        members = [member for member in tar if member.name in wanted]
        if missing := wanted - {member.name for member in members}:
            raise ValueError(f"{archive} lacks {', '.join(sorted(missing))}, so it is not the expected archive.")
        tar.extractall(temporary, members, filter="data")
        (Path(temporary) / folder.name).replace(folder)


def _fetch(url: str, target: Path, *, md5: str, timeout: float = 30.0, most: int = MOST_BYTES) -> Path:
    """`download` for URLs of any scheme."""
    if target.exists():
        _check(target, md5)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if part.is_symlink():
        part.unlink()  # what the link names may belong to somebody else
    try:
        _transfer(url, part, timeout, most)
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"Could not download {url}: {error}.  Run again to resume, or download it by hand to {target}."
        ) from error
    try:
        _check(part, md5)
    except ValueError:
        part.unlink()
        raise
    return part.replace(target)


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not to another scheme: https stays https."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
                         ) -> urllib.request.Request | None:  # fmt: skip
        """Called by urllib for each redirect."""
        if urlsplit(newurl).scheme != req.type:
            raise urllib.error.URLError(f"the server redirects to {newurl[:MOST_URL]}, which is not {req.type}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, part: Path, timeout: float, most: int) -> None:
    """Append the missing bytes of ``url`` to ``part``."""
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.build_opener(_SameScheme).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if offset and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # no bytes after the offset: the part is complete
            raise
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            offset = 0  # the server ignored the range and sends the whole file
        length = response.headers["Content-Length"]
        total = None if length is None else offset + int(length)
        if total is not None and total > most:
            raise ValueError(f"{url} has {total} bytes, more than the limit of {most}.")
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if offset else os.O_TRUNC)
        with os.fdopen(os.open(part, flags, 0o666), "ab" if offset else "wb") as file, _progress() as progress:
            task = progress.add_task(part.stem, total=total, completed=offset)
            while chunk := response.read(CHUNK_SIZE):
                file.write(chunk)
                progress.advance(task, len(chunk))
                if file.tell() > most:
                    part.unlink()
                    raise ValueError(f"{url} has more than {most} bytes, the limit.")
            size = file.tell()
    # If the connection is cut, ``read(size)`` raises no error; it only returns fewer bytes.
    if total is not None and size < total:
        raise ConnectionError(f"the connection was cut after {size} of {total} bytes")


def _check(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if got != md5:
        raise ValueError(
            f"{path} has md5 {got}, expected {md5}: the file is damaged or not the right one.  Download a fresh copy."
        )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty())
