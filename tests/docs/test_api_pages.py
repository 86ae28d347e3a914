"""The pages docs/api/*.md show each public name of accumops once."""

import collections
import importlib
import inspect
import re

import pages

import accumops

MODULES = (accumops, accumops.layers, accumops.losses, accumops.ops)


def shown():
    """The names behind `:::` on the pages."""
    found = []
    for page in sorted((pages.ROOT / "docs" / "api").glob("*.md")):
        found += re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    return found


def resolve(name):
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last)
    except AttributeError:
        return importlib.import_module(name)


def test_each_public_name_is_shown_once():
    times = collections.Counter(id(resolve(name)) for name in shown())
    public = {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__}
    # The modules of this list have all their names on the pages.
    missing = [name for name, value in public.items() if value not in MODULES and times[id(value)] != 1]
    assert missing == []


def test_all_that_is_shown_exists():
    names = shown()
    assert len(names) == len(set(names))
    assert all(resolve(name).__doc__ for name in names)


def test_public_names_are_shown_as_users_write_them():
    public = [name for name in shown() if resolve(name) in [getattr(accumops, each) for each in accumops.__all__]]
    assert public
    assert all(name.count(".") == 1 for name in public), "`accumops.Name`, not the module in which it is defined"


def test_what_is_returned_is_read_as_text():
    """griffe takes what stands before a colon in the first line below `Returns:` for a type."""
    documented = [resolve(name) for name in shown()]
    documented += [member for each in documented if inspect.isclass(each) for member in vars(each).values()]
    texts = [inspect.getdoc(each) or "" for each in documented if callable(each) or isinstance(each, property)]
    returned = [match[1] for text in texts if (match := re.search(r"^Returns:\n +(.+)$", text, re.MULTILINE))]
    assert len(returned) > 10
    assert [line for line in returned if ": " in line or line.endswith(":")] == []
