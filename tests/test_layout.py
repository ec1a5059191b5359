"""The house rules that a machine can check: imports point down between folders, and who may know whom."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Folders from the ground up: a file may import files of its own folder and of folders before it.  At the root of a
# package lie its nouns, which everything is made of, and what stands on top of all folders.
NOUNS = {
    "gradscope": "choices estimates norms operators probes files frames memory distributed",
    "experiments": "program files terminal seeds targets progress",
}
ORDER = {
    "gradscope": """
        nouns meanfield forward initializers models backward jacobians measures coefficients depth transformers checks
        sinks monitor callbacks plots comparing report command top
    """.split(),
    "experiments": "nouns runs data training config archive evidence reports studies top".split(),
}
# Floors that are files at the root of a package.
FILE_FLOORS = {"nouns", "initializers", "top"}
PACKAGES = sorted(ORDER)
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
ALL = [path for package in PACKAGES for path in FILES[package]]
MOST_LINES, MOST_FILES, MOST_FLOORS = 300, 12, 8


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder(module: str) -> str:
    """The folder that a module lies in, or one of the two kinds of files at the root of its package."""
    package, *rest = module.split(".")
    if rest and rest[0] in ORDER[package]:
        return rest[0]
    return "nouns" if rest and rest[0] in NOUNS[package].split() else "top"


@cache
def imports(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


@cache
def own_imports(path: Path) -> frozenset[str]:
    """The modules of the same package that a file imports; a folder only where it is its face that is imported."""
    package = module_name(path).split(".")[0]
    found = imports(path) & {module_name(other) for other in FILES[package]}
    folders = {name.rpartition(".")[0] for name in found}
    return found - {package} - {name for name in folders if module_name(path).startswith(f"{name}.")}


@pytest.mark.parametrize("path", ALL, ids=map(module_name, ALL))
def test_imports_point_down(path):
    name = module_name(path)
    order = ORDER[name.split(".")[0]]
    for imported in own_imports(path):
        floors = order.index(folder(imported)), order.index(folder(name))
        assert floors[0] <= floors[1], f"{name} imports {imported}, whose folder lies above it"


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_circles(package):
    below = {module_name(path): own_imports(path) for path in FILES[package]}
    while below:
        ground = {name for name, imported in below.items() if not imported & below.keys() - {name}}
        assert ground, f"These files import each other: {', '.join(sorted(below))}"
        below = {name: imported for name, imported in below.items() if name not in ground}


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_are_few_floors_high(package):
    above: dict[str, set[str]] = {name: set() for name in ORDER[package]}
    for path in FILES[package]:
        own = folder(module_name(path))
        above[own] |= {folder(name) for name in own_imports(path)} - {own}

    def height(name: str) -> int:
        return 1 + max(map(height, above[name]), default=0)

    assert max(height(name) for name in ORDER[package] if name not in FILE_FLOORS) <= MOST_FLOORS


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_has_its_place_and_few_files(package):
    children = {path.parent.relative_to(ROOT / package).parts for path in FILES[package]}
    assert {parts[0] for parts in children if parts} == set(ORDER[package]) - FILE_FLOORS
    for parts in children - {("studies",)}:  # an open set
        files = [path.name for path in (ROOT / package).joinpath(*parts).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{'/'.join((package, *parts))} holds {len(files)} files: {files}"


@pytest.mark.parametrize("path", ALL, ids=map(module_name, ALL))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


# The command prints, and seeds the models that it builds.
LIBRARY = [path for path in FILES["gradscope"] if folder(module_name(path)) != "command"]


@pytest.mark.parametrize("path", LIBRARY, ids=map(module_name, LIBRARY))
def test_the_library_knows_no_hydra_no_prints_and_no_global_seed(path):
    assert not any(name.split(".")[0] in ("hydra", "omegaconf", "experiments") for name in imports(path))
    assert not re.search(
        r"^\s*print\(|manual_seed_all|torch\.manual_seed|is_grads_batched=True|full_backward_hook",
        path.read_text(),
        re.M,
    )


@pytest.mark.parametrize(
    "name",
    ["gradscope/frames.py", "gradscope/coefficients/reductions.py", "gradscope/coefficients/growth.py"]
    + [
        f"gradscope/{folder}/{path.name}"
        for folder in ("meanfield", "plots")
        for path in (ROOT / "gradscope" / folder).glob("*.py")
    ],
)
def test_files_that_need_no_torch_import_none(name):
    assert not any(imported.split(".")[0] == "torch" for imported in imports(ROOT / name))


def test_the_measuring_half_does_not_know_the_reference_models():
    for path in FILES["gradscope"]:
        if module_name(path).split(".")[1:2] not in (["models"], []):
            assert not any(name.startswith(("gradscope.models", "gradscope.initializers")) for name in imports(path))


STUDIES = [path for path in FILES["experiments"] if module_name(path).startswith("experiments.studies.")]
# What a study may import besides the library, `evidence`, `archive.tables`, `archive.labels`, `reports` and itself.
EXCEPTIONS = {
    "pooling": ("experiments.studies.convolution",),
    "convolution": ("experiments.training", "experiments.data", "experiments.seeds"),
    "effective_depth": ("experiments.data",),
    "repair": ("experiments.data",),
}


@pytest.mark.parametrize("path", STUDIES, ids=map(module_name, STUDIES))
def test_studies_are_islands(path):
    study, *inside = module_name(path).split(".")[2:]
    own = f"experiments.studies.{study}"
    allowed = (
        own, "experiments.evidence", "experiments.archive.tables", "experiments.archive.labels", "experiments.reports",
        *EXCEPTIONS.get(study, ()),
    )  # fmt: skip
    packages = ("experiments.archive", "experiments.studies")  # of which only modules are imported
    for imported in own_imports(path) - set(packages):
        assert imported.startswith(allowed), f"{module_name(path)} imports {imported}"
    if inside in (["measurement"], ["numbers"]):
        assert not any(name.split(".")[0] in ("matplotlib", "seaborn") for name in imports(path))
    if inside:
        assert f"{own}.figures" not in imports(path), "only the study's face imports its figures"
    if inside == ["figures"]:
        assert f"{own}.claims" not in imports(path)


# What may import `experiments.runs`: commands, and the folders that read runs or name their keys.
USERS_OF_RUNS = ("measure", "train", "status", "rerun", "archive", "config.columns")


def test_runs_are_imported_by_few_and_through_their_door():
    for path in FILES["experiments"]:
        name = module_name(path)
        found = {imported for imported in own_imports(path) if imported.startswith("experiments.runs")}
        if found and not name.startswith("experiments.runs"):
            assert found == {"experiments.runs"}, f"{name} imports {found}, not the names of experiments.runs"
            assert name.removeprefix("experiments.").startswith(USERS_OF_RUNS), f"{name} imports experiments.runs"


def test_nothing_imports_the_inside_of_hydra():
    for path in (*FILES["experiments"], *(ROOT / "hydra_plugins").rglob("*.py")):
        assert not any(name.startswith("hydra._internal") for name in imports(path)), path


def test_no_submodule_hides_a_public_function():
    import gradscope

    modules = {path.stem for path in (ROOT / "gradscope").glob("*.py")}
    functions = {name for name in gradscope.__all__ if callable(getattr(gradscope, name))}
    assert not modules & functions


def test_every_public_name_has_a_docstring():
    import gradscope

    assert [name for name in gradscope.__all__ if not (getattr(gradscope, name).__doc__ or "").strip()] == []
