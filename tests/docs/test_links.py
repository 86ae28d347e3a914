"""Links in README, CONTRIBUTING, CHANGELOG and docs/ lead to files and headings that exist."""

import pages
import pytest


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_relative_links_resolve(page):
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path):
    other = tmp_path / "other.md"
    other.write_text("# A `heading`, with more\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[right](other.md#a-heading-with-more) [wrong](other.md#nothing)\n\n"
        "[own](#nothing) [file](none.md) ![picture](none.png) [far](https://example.org/none)\n\n"
        "`[code](none.md)`\n"
    )
    assert dead_links(page) == [
        (1, "other.md#nothing"),
        (3, "#nothing"),
        (3, "none.md"),
        (3, "none.png"),
    ]


def dead_links(page):
    return [(line, target) for line, target in pages.links(page) if not resolves(page, target)]


def resolves(page, target):
    if ":" in target:  # https: or mailto:
        return True
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    if not linked.exists():
        return False
    return not anchor or (linked.suffix == ".md" and anchor in pages.anchors(linked))
