"""Open every page of the site in a browser, narrow and wide, light and dark, and look for what does not fit.

    make docs
    python -m benchmarks.pages                       # all pages of build/site; a minute
    python -m benchmarks.pages --browser chromium --site build/site

A fault is: a page, or something on it that does not scroll, wider than the screen; an image without content; an error
of the formula renderer, or a formula that stayed text; text with a contrast below 3 to its background.  The pages lie
in frames of 400 and 1,400 pixels, so their media queries see these widths.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

WIDTHS, SCHEMES = (400, 1400), {"dark": 0, "light": 1}  # numbers of Chromium's setting preferredColorScheme
SECONDS = 600
LOOK = "/look-at-all-pages.html"
PAGE = """<!doctype html><body><script>
const pages = PAGES, widths = WIDTHS, found = [];
const channels = color => color.match(/[\\d.]+/g).map(Number);
const light = color => {
  const [r, g, b] = color.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, n) => a * c + (1 - a) * below[n]);
const behind = (element, style) => !element ? [255, 255, 255]
  : over(channels(style(element).backgroundColor), behind(element.parentElement, style));
function look(document, style) {
  const faults = [], root = document.documentElement, width = root.clientWidth;
  if (root.scrollWidth > width) faults.push("page wider than the screen by " + (root.scrollWidth - width) + " pixels");
  const scrolls = e => { for (let a = e; a.tagName !== "ARTICLE"; a = a.parentElement)
    if (/auto|scroll|hidden/.test(style(a).overflowX)) return true; return false; };
  for (const e of document.querySelectorAll("article *")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(e)) faults.push("cut: " + e.textContent.trim().slice(0, 50));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (own && box.width && !e.closest("mjx-container, svg")) {
      const below = behind(e, style), text = over(channels(style(e).color), below);
      const [a, b] = [light(text), light(below)].sort((a, b) => b - a);
      if ((a + 0.05) / (b + 0.05) < 3) faults.push("pale: " + e.textContent.trim().slice(0, 50));
    }
  }
  for (const image of document.images) if (!image.naturalWidth) faults.push("no image: " + image.src);
  faults.push(...[...document.querySelectorAll("mjx-merror")].map(e => "formula: " + e.textContent));
  for (const e of document.querySelectorAll("article .math:not(:has(mjx-container))"))
    faults.push("formula that stayed text: " + e.textContent.slice(0, 50));
  return faults;
}
async function all() {
  const frame = document.body.appendChild(document.createElement("iframe"));
  frame.height = 900;
  for (const page of pages) {
    frame.width = widths[0];
    await new Promise(done => { frame.onload = done; frame.src = page; });
    for (const image of frame.contentDocument.images) image.loading = "eager";
    for (let n = 0; n < 40 && [...frame.contentDocument.images].some(i => !i.complete); n++)
      await new Promise(done => setTimeout(done, 25));
    const math = frame.contentWindow.MathJax;
    if (math && math.startup) await math.startup.promise;
    for (const width of widths) {
      frame.width = width;
      await new Promise(done => setTimeout(done, 30));
      const style = e => frame.contentWindow.getComputedStyle(e);
      for (const fault of look(frame.contentDocument, style)) found.push({page, width, fault});
    }
  }
}
all().catch(error => found.push({page: "", width: 0, fault: String(error)}))
  .then(() => fetch("LOOK", {method: "POST", body: JSON.stringify(found)}));
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site and the page that looks at all others, and receives what it found."""

    def __init__(self, *args: Any, page: bytes, found: Queue[Any], **options: Any) -> None:
        self.page, self.found = page, found
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        """Answer with the looking page, or a file of the site."""
        if self.path != LOOK:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.page)

    def do_POST(self) -> None:
        """Receive the faults."""
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing about each request."""


def faults(site: Path, browser: str, scheme: str, pages: list[str]) -> list[dict[str, Any]]:
    """The faults of the pages in one color scheme."""
    found: Queue[Any] = Queue()
    page = PAGE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS)).replace("LOOK", LOOK)
    handler = functools.partial(Handler, directory=str(site), page=page.encode(), found=found)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--user-data-dir={profile}",
            "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}{LOOK}",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                return [{"scheme": scheme, **fault} for fault in found.get(timeout=SECONDS)]
            finally:
                process.terminate()
                process.wait()
                server.shutdown()


def main(arguments: list[str] | None = None) -> None:
    """Print every fault, and how many pages were looked at; exit with 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("build/site"))
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args(arguments)
    if options.browser is None:
        parser.error("There is no Chromium on this machine: install one, or name one with --browser.")
    pages = [str(path.relative_to(options.site)) for path in sorted(options.site.rglob("*.html"))]
    pages = [page for page in pages if not page.startswith(("_static", "_modules"))]
    if not pages:
        parser.error(f"{options.site} holds no pages: run `make docs`, or name the folder with --site.")
    found = [fault for scheme in SCHEMES for fault in faults(options.site, options.browser, scheme, pages)]
    for fault in found:
        print(*fault.values(), sep="\t")
    print(f"{len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels, light and dark: {len(found)} faults")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
