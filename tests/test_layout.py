"""The house rules that a machine can check: imports point down, Hydra stays in experiments, plots know no torch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradscope"

# Each file may import the ones before it, and those of its own line only where listed first.
ORDER = """
estimates operators probes trunk
meanfield.activations meanfield.quadrature meanfield.maps meanfield.batch meanfield.rates
meanfield.spectrum meanfield.prediction meanfield.critical meanfield
growth intervals norms frames
layers taps memory workspace trees
modules
inputs
rerun
recorder
units
pulling
operations links
sweep
coupling jacobians describing
recording
segments taylor
reductions
subspace cotangents
parameters
depth
measures.samples measures.activation measures.gradient measures.symmetry measures
preactivations layer_gradients
measuring
pairs
streaming planning
profiles
nonlinearity
coefficients
reading comparison
checking testing
nonfinite
weights alarms schedule vitals ranks evidence monitor
callbacks.lightning callbacks.transformers callbacks
plots.rows plots.curves plots.rates plots.maps plots.training plots
initializers
models.unfilled models.mlp models.alexnet models.resnet models
__init__
""".split()


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(p) for p in FILES])
def test_imports_point_down(path):
    name = module_name(path)
    own = ORDER.index(name)  # a new file must take its place in the order
    for imported in imports(path):
        inner = imported.removeprefix("gradscope.")
        if imported.startswith("gradscope.") and inner in ORDER:
            assert ORDER.index(inner) < own, f"{name} imports {inner}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=[module_name(p) for p in FILES])
def test_the_library_knows_no_hydra_no_prints_and_no_global_seed(path):
    assert not any(name.split(".")[0] in ("hydra", "omegaconf", "experiments") for name in imports(path))
    assert not re.search(
        r"^\s*print\(|manual_seed_all|torch\.manual_seed|is_grads_batched=True|full_backward_hook",
        path.read_text(),
        re.M,
    )


@pytest.mark.parametrize(
    "name",
    ["gradscope/frames.py", "gradscope/reductions.py", "gradscope/growth.py"]
    + [
        f"gradscope/{folder}/{path.name}"
        for folder in ("meanfield", "plots")
        for path in (PACKAGE / folder).glob("*.py")
    ],
)
def test_files_that_need_no_torch_import_none(name):
    assert not any(imported.split(".")[0] == "torch" for imported in imports(ROOT / name))


def test_the_measuring_half_does_not_know_the_reference_models():
    for path in FILES:
        if module_name(path).split(".")[0] not in ("models", "__init__"):
            assert not any(name.startswith(("gradscope.models", "gradscope.initializers")) for name in imports(path))


def test_no_submodule_hides_a_public_function():
    import gradscope

    modules = {path.stem for path in PACKAGE.glob("*.py")}
    functions = {name for name in gradscope.__all__ if callable(getattr(gradscope, name))}
    assert not modules & functions


def test_every_public_name_has_a_docstring():
    import gradscope

    assert [name for name in gradscope.__all__ if not (getattr(gradscope, name).__doc__ or "").strip()] == []
