"""Downloads from a real HTTP server on this machine that can resume, refuse to, cut the line or fall silent."""

import hashlib
import io
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from experiments.data.download import _fetch, download, extract

CONTENT = np.random.default_rng(0).integers(0, 256, 600_000, np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()
CUT = 400_000


class Server(ThreadingHTTPServer):
    """Serves CONTENT at every path but /missing; ``ranges`` records the Range header of each request."""

    daemon_threads = True
    can_resume = True
    says_length = True
    cut_after: int | None = None
    redirect: str | None = None
    scheme = "http"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.silence = threading.Event()
        self.silence.set()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.silence.wait()
        requested = self.headers["Range"]
        self.server.ranges.append(requested)
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and self.server.can_resume else 0
        if self.path == "/missing" or start >= len(CONTENT):
            return self.send_error(404 if self.path == "/missing" else 416)
        if self.server.redirect is not None:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            return self.end_headers()
        self.send_response(206 if start else 200)
        if self.server.says_length:
            self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.cut_after])
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.silence.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.bin"


def part_of(target: Path, content: bytes) -> Path:
    target.parent.mkdir(exist_ok=True)
    part = target.with_name("file.bin.part")
    part.write_bytes(content)
    return part


def test_fetches_into_a_new_folder_and_leaves_no_part(server: Server, target: Path) -> None:
    assert _fetch(server.url, target, md5=MD5) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert server.ranges == [None]


def test_resumes_after_a_cut(server: Server, target: Path) -> None:
    server.cut_after = CUT
    with pytest.raises(ConnectionError, match=rf"{server.url}: .* cut after {CUT} of 600000 bytes"):
        _fetch(server.url, target, md5=MD5)
    assert not target.exists()
    assert target.with_name("file.bin.part").read_bytes() == CONTENT[:CUT]

    server.cut_after = None
    _fetch(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={CUT}-"]


def test_a_second_cut_counts_from_the_start_of_the_file(server: Server, target: Path) -> None:
    part_of(target, CONTENT[:1000])
    server.cut_after = CUT
    with pytest.raises(ConnectionError, match=f"cut after {CUT} of 600000 bytes"):
        _fetch(server.url, target, md5=MD5)


def test_starts_over_where_the_server_ignores_ranges(server: Server, target: Path) -> None:
    part_of(target, b"something else")
    server.can_resume = False
    _fetch(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.ranges == ["bytes=14-"]


def test_a_complete_part_needs_no_more_bytes(server: Server, target: Path) -> None:
    part_of(target, CONTENT)
    _fetch(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.ranges == ["bytes=600000-"]


def test_a_wrong_checksum_names_both_and_deletes_the_part(server: Server, target: Path) -> None:
    part = part_of(target, b"x" * CUT)
    got = hashlib.md5(b"x" * CUT + CONTENT[CUT:]).hexdigest()
    with pytest.raises(ValueError, match=f"file.bin.part has md5 {got}, expected {MD5}"):
        _fetch(server.url, target, md5=MD5)
    assert not part.exists()
    assert not target.exists()


def test_a_target_fetched_by_hand_is_checked_and_kept(target: Path) -> None:
    part_of(target, CONTENT).rename(target)
    assert download("https://nowhere.invalid/file.bin", target, md5=MD5) == target
    with pytest.raises(ValueError, match=f"file.bin has md5 {MD5}, expected 0123"):
        download("https://nowhere.invalid/file.bin", target, md5="0123")
    assert target.read_bytes() == CONTENT


def test_an_unreachable_server_names_the_url_and_the_way_out(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as closed:
        url = closed.url
    with pytest.raises(ConnectionError, match=rf"{url}: .* by hand to {target}"):
        _fetch(url, target, md5=MD5)


def test_an_http_error_is_named(server: Server, target: Path) -> None:
    with pytest.raises(ConnectionError, match="HTTP Error 404: Not Found"):
        _fetch(server.url.replace("file.bin", "missing"), target, md5=MD5)


def test_a_silent_server_times_out(server: Server, target: Path) -> None:
    server.silence.clear()
    with pytest.raises(ConnectionError, match="timed out"):
        _fetch(server.url, target, md5=MD5, timeout=0.2)


@pytest.mark.parametrize("url", ["http://127.0.0.1/file.bin", "file:///etc/hosts", "ftp://127.0.0.1/file.bin"])
def test_only_https_is_fetched(url: str, target: Path) -> None:
    with pytest.raises(ValueError, match=f"https://, got {url}"):
        download(url, target, md5=MD5)


def encrypted(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server speak https with a certificate that this process trusts."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=a", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, "-days", "2", *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket, server.scheme = context.wrap_socket(server.socket, server_side=True), "https"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate of the server")
def test_redirects_stay_with_https(
    server: Server, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server() as plain:
        encrypted(server, tmp_path, monkeypatch)
        server.redirect = plain.url
        with pytest.raises(ConnectionError, match=rf"redirects to {plain.url}, which is not https"):
            download(server.url, target, md5=MD5)
        assert plain.ranges == [] and list(target.parent.iterdir()) == []
        server.redirect = None
        assert download(server.url, target, md5=MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("says_length", [True, False])
def test_a_file_above_the_limit_is_not_kept(server: Server, target: Path, says_length: bool) -> None:
    server.says_length = says_length
    more = "has 600000 bytes, more than the limit of 599999" if says_length else "has more than 599999 bytes, the limit"
    with pytest.raises(ValueError, match=f"{server.url} {more}"):
        _fetch(server.url, target, md5=MD5, most=len(CONTENT) - 1)
    assert list(target.parent.iterdir()) == []
    assert _fetch(server.url, target, md5=MD5, most=len(CONTENT)).read_bytes() == CONTENT


def test_a_part_counts_against_the_limit(server: Server, target: Path) -> None:
    part_of(target, CONTENT[:CUT])
    with pytest.raises(ValueError, match="has 600000 bytes, more than the limit of 500000"):
        _fetch(server.url, target, md5=MD5, most=500_000)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_only(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        _fetch(server.url, target, md5=MD5)
        assert ("file.bin" in stream.getvalue()) == stream.isatty()
        target.unlink()


def archive_of(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def test_extracts_the_expected_members_only(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", "../evil", "box/one", "box/readme", "box/two", "/tmp/evil")
    extract(archive, tmp_path / "box", ["two", "one"])
    assert {path.name: path.read_text() for path in (tmp_path / "box").iterdir()} == {
        "one": "box/one",
        "two": "box/two",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar.gz", "box"}


def test_an_archive_without_a_member_leaves_no_folder(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", "box/one")
    with pytest.raises(ValueError, match=r"a.tar.gz lacks box/three, box/two"):
        extract(archive, tmp_path / "box", ["one", "two", "three"])
    assert list(tmp_path.iterdir()) == [archive]


def test_a_member_that_points_outside_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("box/one")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        tar.addfile(link)
    with pytest.raises(tarfile.FilterError, match="absolute path"):
        extract(archive, tmp_path / "box", ["one"])
