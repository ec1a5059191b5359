"""The site: Markdown pages of this repository, the API from docstrings, and examples and lessons that are executed.

The root of the repository is the source folder, so links between pages work on the site as they do in the repository.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the examples are small

import torch

import gradscope

project = "gradscope"
author = "The gradscope authors"
copyright = "the gradscope authors"
version = release = gradscope.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
root_doc = "README"
include_patterns = [
    "README.md", "docs/**", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "results/README.md",
    "results/calibration/README.md",
]  # fmt: skip
# Besides the pages, folders that are not worth walking through.
exclude_patterns = [
    ".*", "build", "conf", "dist", "experiments", "gradscope", "hydra_plugins", "tests", "docs/_*", "docs/examples",
    "docs/lessons", "docs/contents.md", "docs/**/*.ipynb", "**/sg_execution_times.rst", "**/runs",
]  # fmt: skip
templates_path = ["_templates"]
default_role = "py:obj"
suppress_warnings = ["config.cache", "myst.header"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autosummary_generate = True
autodoc_typehints = "none"  # signatures name defaults; types stand in the text
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_use_rtype = False

html_theme = "furo"
html_title = "gradscope"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_start.html"}  # the address of the site itself
html_extra_path = ["llms.txt"]
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def quiet(_configuration, _file):
    """Run every example with one thread and the same random numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


# Where the scripts are, and where their pages are written.
EXECUTED = {ROOT / "docs/examples": ROOT / "docs/gallery", ROOT / "docs/lessons": ROOT / "docs/lecture"}
sphinx_gallery_conf = {
    "examples_dirs": [str(folder) for folder in EXECUTED],
    "gallery_dirs": [str(folder) for folder in EXECUTED.values()],
    "filename_pattern": "",
    "ignore_pattern": r"__init__\.py",
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "remove_config_comments": True,
    "default_thumb_file": str(ROOT / "docs/_static/text.png"),
    "min_reported_time": 5,
    "show_memory": False,
    "show_signature": False,
    "plot_gallery": "True",
    "matplotlib_animations": False,
    "capture_repr": ("_repr_html_", "__repr__"),
    "ignore_repr_types": r"matplotlib\.|<lambda|tuple",
    "reset_modules": ("matplotlib", "seaborn", quiet),
}


LINK = re.compile(r"\]\(([^)#:\s]+)\)")


def adapt(app, name, source):
    """Add the table of contents to the first page; lead links to folders and scripts to their pages."""

    def page(match):
        target = (path.parent / match[1]).resolve()
        if target.is_dir():
            study = ROOT / "docs/studies" / f"{target.name}.md"
            target = study if study.exists() else ROOT / "results/README.md"
        elif target.parent in EXECUTED:
            name = "index" if target.stem == "README" else target.stem
            target = EXECUTED[target.parent] / f"{name}.rst"
        else:
            return match[0]
        return f"]({os.path.relpath(target, path.parent)})"

    path = Path(app.env.doc2path(name))
    if path.suffix == ".md":
        source[0] = LINK.sub(page, source[0])
    if name == root_doc:
        source[0] += "\n" + (ROOT / "docs/contents.md").read_text()
    if name == "docs/studies/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


FIELD = re.compile(r"(\s*(?::[^:`]+:(?=\s|$))?)(.*)", re.DOTALL)
CODE = re.compile(r"(``.+?``|`[^`]+`)")


def restructured(app, what, name, obj, options, lines):
    """Docstrings are plain text: indented formulas become literal blocks, and signs of formulas stay signs."""
    found, block, previous = [], None, ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent < block:
            block = None
        begins = line.strip() and not previous.strip() and not line.lstrip().startswith(">>>")
        if block is None and begins and indent > _indent(found) and not _section(found):
            found += [f"{' ' * _indent(found)}::", ""]
            block = indent
        if block is None and not line.lstrip().startswith((">>>", "...", "..")):
            field, text = FIELD.match(line).groups()
            parts = enumerate(CODE.split(text))
            line = field + "".join(part if n % 2 else re.sub(r"([*|]|_\b)", r"\\\1", part) for n, part in parts)
        found.append(line)
        previous = line
    lines[:] = found


def _indent(lines):
    return next((len(line) - len(line.lstrip()) for line in reversed(lines) if line.strip()), 0)


def _section(lines):
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.startswith((":", "..", "- ", "* "))


def setup(app):
    """Connect what adapts pages and docstrings."""
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", restructured, priority=900)
