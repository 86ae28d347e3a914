"""The blocks of code of README and docs/ run as they stand, and their commands exist.

A page's blocks of Python run from top to bottom in one namespace. A block behind `<!-- not run: why -->` is left out.
"""

import itertools
import shlex
from pathlib import Path

import click
import pages
import processes
import pytest

from accumops.cli import main as accumops_command
from accumops.cli.bench import SUITES

LANGUAGES = ("python", "pycon", "sh", "text", "bibtex", "cpp", "make", "toml", "yaml")
# Their blocks take longest.
LONG = tuple(
    f"docs/{name}.md"
    for name in (
        "batch_normalization",
        "batch_size",
        "coming_from",
        "embeddings",
        "exactness",
        "learning_rate",
        "mixed_precision",
        "noise_scale",
        "quickstart",
        "recompute",
        "several_devices",
        "tensorboard",
        "which_way",
        "window_losses",
        "xla",
    )
)


def with_blocks():
    for page in pages.PAGES:
        if any(block.is_run and block.language in ("python", "pycon") for block in pages.blocks(page)):
            name = pages.name_of(page)
            yield pytest.param(page, id=name, marks=[pytest.mark.exhaustive] if name in LONG else [])


@pytest.mark.parametrize("page", list(with_blocks()))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"ACCUMOPS_CACHE_DIR": str(tmp_path / "cache")}  # plans that were found before are not to be used
    done = processes.run(Path(__file__).with_name("run_blocks.py"), page, environment=environment, timeout=600)
    assert done.returncode == 0, f"{pages.name_of(page)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


PAGE = """
# A page

```python
import tensorflow as tf

x = 3


@tf.function
def double(n):
    if n > 2:  # AutoGraph reads the source
        return 2 * n
    return n
```

<!-- not run: it has no such name -->
```python
nonsense()
```

```python
print(int(double(tf.constant(x))))
```

```pycon
>>> x + 1
4
```
"""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("", ""), None),
        (("print(int", "print(no_such_name, int"), 'page.md", line 23, in <module>\n'),
        (("import tensorflow as tf", ""), 'page.md", line 10, in <module>\n'),
        (("<!-- not run: it has no such name -->\n", ""), 'page.md", line 18, in <module>\n'),
        (("\n4\n", "\n5\n"), 'page.md", line 27, in page.md\n'),
    ],
    ids=["right", "unknown name", "no import", "not marked", "doctest"],
)
def test_a_failure_names_page_and_line(change, problem, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(*change) if change[0] else PAGE)
    done = processes.run(Path(__file__).with_name("run_blocks.py"), page, timeout=600)
    if problem is None:
        assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
    else:
        assert done.returncode == 1
        assert problem in done.stdout + done.stderr


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_each_block_has_a_known_language(page):
    """A block in an unknown language would not be run."""
    unknown = {block.line: block.language for block in pages.blocks(page) if block.language not in LANGUAGES}
    assert unknown == {}


def commands():
    for page in pages.PAGES:
        for block in pages.blocks(page):
            if block.language != "sh":
                continue
            for number, line in enumerate(block.code.replace("\\\n", "  ").splitlines(), start=block.line):
                words = shlex.split(line, comments=True)
                if "accumops" in (Path(word).name for word in words[:1]):
                    yield pytest.param(words[1:], id=f"{pages.name_of(page)}:{number}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist(words):
    """Has click parse what stands behind `accumops`, up to the files that it names."""
    known = accumops_command.commands
    assert words[0] in known or words[0] in ("--help", "--version"), f"no command {words[0]!r}"
    if words[0] not in known:
        return
    command = known[words[0]]
    options = {name: parameter for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.split("=")[0] for word in words[1:] if word.startswith("-")]
    assert set(given) <= {*options, "--help"}
    if words[0] == "bench" and len(words) > 1 and not words[1].isupper():
        assert words[1] in SUITES
    for name, value in itertools.pairwise(words):
        if name in options and isinstance(options[name].type, click.Choice):
            assert value.lower() in [choice.lower() for choice in options[name].type.choices]
