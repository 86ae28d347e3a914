"""Which functions, classes and other names the project's files define, to check what the documents say of them."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CPP = (".cc", ".h", ".cu", ".cuh")


def defines(path, name):
    """Whether a file defines a name: a function, a class, a method `Class.method`, or a variable.

    Args:
        path: The file, relative to the project.
        name: The name; a method may stand alone.
    """
    text = (ROOT / path).read_text()
    if path.endswith((".py", ".pyi")):
        return name in _python_names(path)
    if path.endswith(_CPP):
        return re.search(rf"\b(?:class|struct)\s+{name}\b|\b{name}\s*\(", text) is not None
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


@functools.cache
def _python_names(path):
    names = set()
    for qualified, node in _definitions(ast.parse((ROOT / path).read_text())):
        names |= {qualified, node.name}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "new_variable":
            names.update(each.value for each in node.args if isinstance(each, ast.Constant))
    return names


def _definitions(tree, within=""):
    """Yields the functions and classes of a module with their qualified names, those within others included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield within + node.name, node
            yield from _definitions(node, f"{within}{node.name}.")
        else:
            yield from _definitions(node, within)


@functools.cache
def functions_by_line(path):
    """The qualified names of a Python file's functions, by the line that their code objects start with."""
    return {
        min([node.lineno, *(each.lineno for each in node.decorator_list)]): name
        for name, node in _definitions(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
