"""A hook of MkDocs: the site also shows pages and files that live outside docs/.

CONTRIBUTING.md and CHANGELOG.md become pages of the site. Other files that a page links to, such as an example or a
recorded measurement, are copied to `repository/`; those in Markdown become pages. Links are written as on GitHub,
relative to the file that has them, and are changed to lead to the same places in the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
_COPIES = "repository/"
# Code, which is left alone, or the target of a link.
_CODE_OR_LINK = re.compile(
    r"^```.*?^```|`[^`\n]+`|(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>\))", re.DOTALL | re.MULTILINE
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the top folder, and each file outside docs/ that a page links to, directly or not."""
    root = Path(config.config_file_path).parent
    sources = {source: root / source for source in _PAGES if source != "README.md"}
    for file in files.documentation_pages():
        sources[f"docs/{file.src_uri}"] = Path(str(file.abs_src_path))
    unread = list(sources)
    while unread:
        source = unread.pop()
        for target in _targets(source, sources[source].read_text(encoding="utf-8")):
            if _is_copied(target) and target not in sources and (root / target).is_file():
                sources[target] = root / target
                unread += [target] if target.endswith(".md") else []
    for source, path in sources.items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, _in_site(source), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes the links of a page to the places in the site."""
    own = page.file.src_uri
    source = _in_repository(own)

    def changed(found: re.Match[str]) -> str:
        path, mark, anchor = (found["target"] or "").partition("#")
        if not path or _is_elsewhere(path):
            return found[0]
        target = posixpath.relpath(_in_site(_from(source, path)), posixpath.dirname(own) or ".")
        return found["before"] + target + mark + anchor + found["after"]

    return _CODE_OR_LINK.sub(changed, markdown)


def _targets(source: str, markdown: str) -> list[str]:
    """The files of the repository that a page links to."""
    found = [match["target"].partition("#")[0] for match in _CODE_OR_LINK.finditer(markdown) if match["target"]]
    return [_from(source, path) for path in found if path and not _is_elsewhere(path)]


def _is_elsewhere(path: str) -> bool:
    return ":" in path or path.startswith("/")


def _is_copied(source: str) -> bool:
    return not source.startswith(("docs/", "../")) and source not in _PAGES


def _from(source: str, path: str) -> str:
    """The path in the repository of what `source` calls `path`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _in_site(source: str) -> str:
    if source in _PAGES:
        return _PAGES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else _COPIES + source


def _in_repository(uri: str) -> str:
    pages: dict[str, Any] = {site: source for source, site in _PAGES.items() if source != "README.md"}
    if uri in pages:
        return pages[uri]
    return uri.removeprefix(_COPIES) if uri.startswith(_COPIES) else f"docs/{uri}"
