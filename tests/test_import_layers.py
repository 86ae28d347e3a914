"""Each room of the package imports only from the rooms below it, and no module imports itself in a circle."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "accumops"
FLOORS = (
    {"renamed", "sizes"},
    {"arguments", "adapters"},
    {"ops"},
    {"window"},
    {"optimizer", "normalization"},
    {"memory", "losses", "layers"},
    {"planning", "layerwise"},
    {"training"},
    {"verification"},
    {"benchmark"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports_of(module):
    """The modules of accumops that a module names in its imports, those within functions included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    yield f"{node.module}.{alias.name}"
                elif node.module in MODULES:
                    yield node.module


def room_of(module):
    return ([*module.split("."), ""])[1]


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in FLOOR_OF])
def test_imports_go_down(module):
    room = room_of(module)
    above = [
        other
        for other in imports_of(module)
        if room_of(other) in FLOOR_OF and room_of(other) != room and FLOOR_OF[room_of(other)] >= FLOOR_OF[room]
    ]
    assert above == []


def test_all_rooms_have_a_floor():
    assert {room_of(module) for module in MODULES} - {""} - set(FLOOR_OF) <= {"registration"}


def test_no_circles():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in imports_of(module):
                if other != "accumops":
                    visit(other)
            done.add(path.pop())

    for module in MODULES:
        visit(module)
