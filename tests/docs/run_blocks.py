"""Runs a page's blocks of Python in one namespace, in order: run_blocks.py PAGE. Tracebacks name the page's lines."""

import doctest
import linecache
import sys
import types
from pathlib import Path

import pages

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def main(page):
    sources = [block for block in pages.blocks(page) if block.is_run and block.language in ("python", "pycon")]
    show_only_code(page, sources)
    module = sys.modules["__main__"] = types.ModuleType("__main__")  # without this script's own names
    namespace = vars(module)
    failed = 0
    for block in sources:
        if block.language == "pycon" or block.code.lstrip().startswith(">>>"):
            failed += run_doctest(page, block, namespace)
        else:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    sys.exit(bool(failed))


def show_only_code(page, sources):
    """Has tracebacks, and AutoGraph, read the page's code at its place, and nothing around it."""
    lines = ["\n"] * (len(page.read_text().splitlines()) + 1)
    for block in sources:
        code = block.code.splitlines(keepends=True)
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    linecache.cache[str(page)] = sum(map(len, lines)), None, lines, str(page)


def run_doctest(page, block, namespace):
    test = doctest.DocTestParser().get_doctest(block.code, namespace, page.name, str(page), block.line - 1)
    results = doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False)
    namespace.update(test.globs)
    return results.failed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
