"""A page as a real browser shows it: its document, what it says on the console, and what it asks of the network."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, to open the page as a reader does")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
    "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


class Opened:
    """``dom``: the document after its scripts; ``console``: messages; ``requests``: what it loads besides itself."""

    def __init__(self, page: Path, folder: Path, *flags: str, script: str = ""):
        if script:  # runs after the page's own scripts
            text, _, end = page.read_text().rpartition("</body>")
            page = folder / "scripted.html"
            page.write_text(f"{text}<script>{script}</script></body>{end}")
        log = folder / "net.json"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", *flags]
        done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240)
        self.dom = done.stdout
        self.console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        # What the browser asks for itself has no origin.
        asked = {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}
        self.requests = sorted(url for url in asked if not url.startswith(("file:", "data:")))
        self.tables = Tables(self.dom).tables


class Tables(HTMLParser):
    """All tables of a document: a list of rows, each a list of cells (exact value if there is one, else text)."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.value, self.open = None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open = self.open and tag in ("small", "button")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables:
            self.value, self.open = dict(attributes).get("data-value"), True
            self.tables[-1][-1].append(self.value or "")

    def handle_endtag(self, tag):
        self.open = self.open and tag in ("small", "button")

    def handle_data(self, data):
        if self.open and self.value is None:
            self.tables[-1][-1][-1] += data.strip()
