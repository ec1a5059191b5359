"""The file of a page: the packages that it needs, and the filled template."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gradscope.files import printable, written
from gradscope.report import charts
from gradscope.report.sections import Section

PACKAGES = ("altair", "jinja2", "vl_convert")


def require_packages() -> None:
    """Raise ImportError if a package that draws or fills the page is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f'A report needs {", ".join(missing)}: pip install "gradscope-toolkit[report]".')


def write(
    path: Path, title: str, about: str, headline: str, verdict: str, facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
) -> Path:  # fmt: skip
    """Fill the template and write the file atomically."""
    import jinja2

    template = jinja2.Environment(
        loader=jinja2.PackageLoader("gradscope", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")
    scripted = any(section.chart for section in sections)
    text = template.render(
        title=title, about=about, headline=headline, verdict=verdict or "undecided", facts=facts, sections=sections,
        scripted=scripted, vega=charts.javascript() if scripted else "",
    )  # fmt: skip
    return written(path, lambda temporary: temporary.write_text(printable(text), encoding="utf-8"))
