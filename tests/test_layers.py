import ast
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "momconv"
# Each may import itself and what stands before it. "__init__" is the public face, momconv/__init__.
LAYERS = [
    "_version",
    "vocabulary",
    "names",
    "words",
    "errors",
    "units",
    "opening",
    "exhaustion",
    "allocator",
    "states",
    "heap",
    "determinism",
    "machine_code",
    "eightbit",
    "pixels",
    "recipe",
    "cookbook",
    "catalogue",
    "tracing",
    "momentum",
    "zoo",
    "surgery",
    "files",
    "planner",
    "data",
    "evaluation",
    "prediction",
    "training",
    "demo",
    "diagnosis",
    "reports",
    "converting",
    "hub",
    "__init__",
    "cli",
    "__main__",
]
NO_TORCH = [
    "momconv.errors",
    "momconv.exhaustion",
    "momconv.units",
    "momconv.vocabulary",
    "momconv.names",
    "momconv.words",
    "momconv.recipe",
    "momconv.data.splits",
]
NO_TORCH += ["momconv.cookbook", "momconv.catalogue", "momconv.reports.models"]
NO_TORCH += [f"momconv.cli.{path.stem}" for path in PACKAGE.glob("cli/*.py")]


def imported_layers(source: str, package: str) -> set[str]:
    """The layers that ``source``, a module of ``package``, imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    layers = {f"{name}.".split(".")[1] for name in names if name.split(".")[0] == "momconv"}
    return {layer if layer in LAYERS else "__init__" for layer in layers}


def layers_above(source: str, module: Path) -> set[str]:
    """The layers that ``source`` imports although they stand above its own."""
    own = LAYERS.index(module.parts[0].removesuffix(".py"))
    package = ".".join(["momconv", *module.parent.parts])
    return imported_layers(source, package) - set(LAYERS[: own + 1])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path: Path) -> None:
    above = layers_above(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE))
    if path != PACKAGE / "__init__.py":  # whose __getattr__ imports lazily
        assert not above


@pytest.mark.parametrize(
    ("line", "above"),
    [
        ("import momconv.surgery.runs", {"surgery"}),
        ("import torch, momconv.cli as frame", {"cli"}),
        ("from momconv import units, zoo", {"zoo"}),
        ("from momconv import load", {"__init__"}),
        ("import momconv", {"__init__"}),
        ("from .. import surgery", {"surgery"}),
        ("from ..files.atomic import write_text", {"files"}),
        ("def f():\n    from momconv.training import loop", {"training"}),
        ("from momconv.momentum import equations\nfrom . import kernels\nimport torch.cli", set()),
    ],
)
def test_an_import_of_a_higher_layer_would_be_found(line: str, above: set[str]) -> None:
    assert layers_above(line, Path("momentum/sequential.py")) == above


def test_the_architecture_page_lists_the_layers_in_their_order() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## The layers")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for cell in first_cells for name in cell.split("`")[1::2]] == LAYERS


def test_a_class_that_others_import_has_a_name_of_its_own() -> None:
    bodies = [ast.parse(path.read_text(encoding="utf-8")).body for path in PACKAGE.rglob("*.py")]
    names = Counter(node.name for body in bodies for node in body if isinstance(node, ast.ClassDef))
    assert [name for name, n in names.items() if n > 1 and not name.startswith("_")] == []


@pytest.mark.parametrize("module", NO_TORCH)
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
