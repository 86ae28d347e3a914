"""docs/inside.md and its drawing name files and functions that exist, in the order in which they run."""

import re
import sys
import xml.etree.ElementTree

import keras
import numpy as np
import pytest
from named_code import ROOT, defines, functions_by_line

import accumops

PAGE = ROOT / "docs" / "inside.md"
DRAWING = ROOT / "docs" / "life_of_a_gradient.svg"
FILE = re.compile(r"[\w./]+\.(?:py|pyi|cc|h|cu|cuh|txt|md)")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
# Words in code that no file which the page names defines: of other packages, values, and targets of make.
OTHERS = {
    "ACCUMOPS_BACKEND",
    "tape.gradient",
    "tf.IndexedSlices",
    "tf.function",
}


def spans(text):
    """The spans of code in a text without its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


TEXT = PAGE.read_text()
FILES = sorted({span for span in spans(TEXT) if FILE.fullmatch(span)})
FOLDERS = sorted({span for span in spans(TEXT) if re.fullmatch(r"[\w.]+(?:/[\w.]+)+", span) and span not in FILES})


def rows(heading=""):
    """The file and the names in each row of the tables below a heading."""
    text = TEXT.partition(heading)[2] if heading else TEXT
    if heading:
        text = re.split(r"^#", text.partition("\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    for line in text.splitlines():
        found = spans(line.split(" | ", 2)[0] + " | " + line.split(" | ", 2)[1]) if line.startswith("| `") else []
        if found and FILE.fullmatch(found[0]):
            yield found[0], found[1:]


def file_of(name):
    """The path of a file, which the page may give without its folder."""
    if "/" in name or (ROOT / name).is_file():
        return name
    found = [path for folder in ("src", "accumops", "tests") for path in (ROOT / folder).rglob(name)]
    return found[0].relative_to(ROOT).as_posix() if len(found) == 1 else name


@pytest.mark.parametrize("name", FILES)
def test_files_exist(name):
    assert (ROOT / file_of(name)).is_file()


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_exist(name):
    assert (ROOT / name).is_dir()


def pairs():
    """The names that the page says a file has: in a row of a table, as `name` in `file`, and as `file`: `name`."""
    found = [(file, name) for file, names in rows() for name in names]
    found += [(file, name) for name, file in re.findall(r"`([\w.]+)`\s+in\s+`([\w./]+)`", TEXT)]
    found += [(file, name) for file, name in re.findall(r"`([\w./]+\.\w+)`: `([\w.]+)`", TEXT)]
    return sorted({(file, name) for file, name in found if FILE.fullmatch(file)})


@pytest.mark.parametrize(("file", "name"), pairs())
def test_functions_are_where_the_page_says(file, name):
    assert defines(file_of(file), name)


def test_all_other_names_are_defined_in_a_file_of_the_page():
    files = [file_of(name) for name in FILES]
    names = {span.partition("(")[0].partition("<")[0] for span in spans(TEXT) if span not in FILES}
    names = {name for name in names if NAME.fullmatch(name)}
    unknown = {name for name in names if not any(defines(file, name) for file in files)}
    assert unknown <= OTHERS
    assert names >= OTHERS, "a word that the page no longer has"


def steps_of_drawing():
    space = {"svg": "http://www.w3.org/2000/svg"}
    for step in xml.etree.ElementTree.parse(DRAWING).iterfind(".//svg:g[@class='step']", space):
        name, file = (step.find(f"svg:text[@class='{kind}']", space).text for kind in ("name", "file"))
        yield file, name


def test_the_drawing_has_the_steps_of_the_page_in_its_order():
    remaining = iter([(file, name) for file, names in rows() for name in names])
    for step in steps_of_drawing():
        assert step in remaining, step


class Calls:
    """Records the first calls of functions of the project, while it is a profiler."""

    def __init__(self):
        self.order = {}

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event == "call" and "accumops" in code.co_filename:
            self.order.setdefault((code.co_filename, code.co_firstlineno), len(self.order))

    def first(self, file, names):
        """When one of these functions of a file was first called; None if none was."""
        lines = functions_by_line(file)
        path = str(ROOT / file)
        times = [time for (filename, line), time in self.order.items() if filename == path and lines.get(line) in names]
        return min(times, default=None)


@pytest.mark.parametrize("mode", ["accum_steps", "micro_batch_size"])
def test_functions_run_in_the_order_of_the_page(mode):
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model = accumops.GradientAccumulateModel(net, **{mode: 2})
    model.compile("sgd", loss="mse")
    calls, before = Calls(), sys.getprofile()
    sys.setprofile(calls)
    try:
        model.fit(np.ones([8, 3]), np.ones([8, 1]), batch_size=4, verbose=0)
    finally:
        sys.setprofile(before)
    expected = [*rows("### Before the first step"), *rows(f"### With `{mode}`")]
    times = [calls.first(file, names) for file, names in expected]
    assert None not in times, expected[times.index(None)]
    assert times == sorted(times)
