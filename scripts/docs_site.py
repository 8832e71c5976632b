"""Hooks of the docs site (mkdocs.yml): what pages link to outside docs/ is part of the site.

Links in `docs/*.md` are relative to the project, so that they work where the project is read as files. What such a link
names is a page below `project/` too: texts as they are, code as a listing, a notebook as both, a folder as a list of
files; pictures and data are copied. A link to what does not exist fails the build (`mkdocs build --strict`).
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
RESULTS = "benchmarks/results/README.md"  # in the navigation
ELSEWHERE = "project/"  # where files outside docs/ appear in the site

LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".slurm": "bash"}
COPIED = {".svg", ".png", ".gif", ".json", ".jsonl", ".csv"}

_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`+[^`\n]+`+", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")


def map_links(markdown: str, change: Callable[[str], str]) -> str:
    """The text with the target of every link and picture changed; code is left as it is."""
    done, parts = 0, []
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(lambda link: change(link[1]), markdown[done : code.start()]), code[0]]
        done = code.end()
    parts.append(_LINK.sub(lambda link: change(link[1]), markdown[done:]))
    return "".join(parts)


def links(markdown: str) -> list[str]:
    """The targets of all links and pictures in a text."""
    found: list[str] = []
    map_links(markdown, lambda target: found.append(target) or target)  # type: ignore[func-returns-value]
    return found


def linked_path(target: str, page: str) -> str | None:
    """The file or folder of the project that a link on `page` names, both as paths from the project's root.

    None where it leads elsewhere: to another site, or within the page.
    """
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path)))


def site_path(path: str) -> str:
    """Where a file or folder of the project lies among the sources of the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    suffix = Path(path).suffix
    if (ROOT / path).is_dir():
        return f"{ELSEWHERE}{path}/index.md"
    return f"{ELSEWHERE}{path}" if suffix in COPIED or suffix == ".md" else f"{ELSEWHERE}{path}.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages outside docs/ that the navigation names; and those of docs/ that it does not name, at its end."""
    text = (ROOT / "mkdocs.yml").read_text()
    unnamed = [page.name for page in sorted((ROOT / DOCS).glob("*.md")) if page.name not in text]
    nav = [_on_site(entry) for entry in config.nav or []]
    config.nav = [*nav, {"More": unnamed}] if unnamed else nav
    return config


def _on_site(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the navigation, or several below a title, with the paths of the site's sources."""
    return {
        title: site_path(linked_path(pages, DOCS) or "")
        if isinstance(pages, str)
        else [_on_site(page) for page in pages]
        for title, pages in entry.items()
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to, and what that links to in turn."""
    from mkdocs.structure.files import File, InclusionLevel

    texts = {DOCS + file.src_uri: file.content_string for file in files.documentation_pages()}
    pending = [RESULTS, *_notebooks(), *(path for page, text in texts.items() for path in _project_files(text, page))]
    while pending:
        path = pending.pop()
        uri = site_path(path)
        if path.startswith(DOCS) or files.get_file_from_path(uri) or not (ROOT / path).exists():
            continue  # a link to nothing stays as it is, and mkdocs warns of it
        if Path(path).suffix in COPIED:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            continue
        text = _page(path)
        files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
        pending += _project_files(text, f"{path}/." if (ROOT / path).is_dir() else path)
    return files


def _notebooks() -> list[str]:
    return [file.relative_to(ROOT).as_posix() for file in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def _project_files(text: str, page: str) -> list[str]:
    paths = (linked_path(target, page) for target in links(text))
    return [path for path in paths if path is not None]


def _page(path: str) -> str:
    """The page that shows a text file or folder of the project."""
    file = ROOT / path
    if file.is_dir():
        shown = [child for child in sorted(file.iterdir()) if _is_shown(child)]
        rows = [f"- [`{child.name}`]({child.name}){_summary(child)}" for child in shown]
        return "\n".join([f"# `{path}/`", "", *rows, ""])
    text = file.read_text()
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return _notebook_page(json.loads(text)["cells"])
    return f"# `{path}`\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n````\n"


def _notebook_page(cells: list[dict[str, Any]]) -> str:
    """A notebook's text, and its code as listings."""
    sources = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{source}\n```" if is_code else source for source, is_code in sources) + "\n"


def _is_shown(file: Path) -> bool:
    return file.is_file() and file.suffix in LANGUAGES.keys() | {".md"} and not file.name.startswith(".")


def _summary(file: Path) -> str:
    """What a file says of itself in its first line."""
    text = file.read_text()
    if file.suffix == ".py":
        about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        about = text.partition("\n")[0].lstrip("# ")
    return f": {about}" if about else ""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the project become links between pages of the site."""
    uri = page.file.src_uri
    if uri.startswith(ELSEWHERE):
        own = uri.removeprefix(ELSEWHERE)
        folder = own.removesuffix("/index.md")
        own = f"{folder}/." if own != folder and (ROOT / folder).is_dir() and not (ROOT / own).exists() else own
    else:
        own = DOCS + uri

    def on_site(target: str) -> str:
        path = linked_path(target, own)
        if path is None or not (ROOT / path).exists():
            return target
        fragment = urlsplit(target).fragment
        relative = posixpath.relpath(site_path(path), posixpath.dirname(uri) or ".")
        return f"{relative}#{fragment}" if fragment else relative

    return map_links(markdown, on_site)
