"""The rules of CONTRIBUTING.md about the layout of the package."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "openvla_hf"
# From the bottom up: a room imports from itself and from the rooms before it.
ROOMS = [
    "modeling",
    "processing",
    "data",
    "suites",
    "checkpoints",
    "training",
    "tabletop",
    "evaluation",
    "serving",
    "cli",
]
LONGEST_FILE = 500
LONGEST_FUNCTION = 60  # lines, without the docstring
MODULES = {
    ".".join(("openvla_hf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module):
    """Yield the modules of the package that a module imports, also within functions and only for types."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")
            source = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in MODULES else source


IMPORTS = {module: set(imports(module)) - {module} for module in MODULES}


def test_no_imports_are_circular():
    list(TopologicalSorter(IMPORTS).static_order())


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_from_the_rooms_below(name):
    above = ROOMS[ROOMS.index(name) + 1 :]
    found = {
        (module, imported) for module in MODULES if room(module) == name for imported in IMPORTS[module]
        if room(imported) in above
    }  # fmt: skip
    assert found == set()


def functions():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1 - docstring


def test_no_function_is_longer_than_a_screen():
    assert {name: lines for name, lines in functions() if lines > LONGEST_FUNCTION} == {}


def test_no_file_is_longer_than_500_lines():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST_FILE} == {}
