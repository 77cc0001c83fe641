"""Settings of the documentation site, which `make docs` builds."""

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from memkv_sglang import __version__

project = "sglang-memkv"
release = version = __version__
author = "the sglang-memkv authors"
copyright = f"2026, {author}"  # noqa: A001

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "sglang-memkv"
html_show_sourcelink = False

myst_heading_anchors = 3

napoleon_numpy_docstring = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Neither a GPU build of SGLang nor torch is needed to build the reference.
autodoc_mock_imports = ["sglang", "torch"]

PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "SECURITY.md": "threat-model",
    "benchmarks/README.md": "benchmarks",
    "patches/README.md": "patches",
    "cpu-platform/README.md": "cpu-platform",
}
"""Documents outside `docs/` and the pages that include them."""

SOURCES = "https://github.com/sglang-memkv/sglang-memkv/blob/main/"
"""Where links to everything else in the repository lead."""


def resolve_links(app: Sphinx, doctree: nodes.document) -> None:
    """Point links to files outside `docs/` at the page that includes them, or at the repository."""
    for link in doctree.findall(addnodes.pending_xref):
        path = _repository_path(app, link["reftarget"])
        if path in PAGES:
            link["refdomain"], link["reftarget"] = "doc", PAGES[path]
            link["reftargetid"] = None
        elif path and link["reftype"] in {"myst", "download"}:
            reference = nodes.reference("", "", *link.children, refuri=SOURCES + path)
            link.replace_self(reference)


def _repository_path(app: Sphinx, target: str) -> str:
    """Return the path in the repository that a link means; empty for pages, headings and names."""
    root, path = app.srcdir.parent, target.partition("#")[0].removesuffix("/")
    for folder in (app.srcdir, root):
        found = (folder / path).resolve()
        for candidate in (found, found.with_name(found.name + ".md")):
            inside = candidate.is_relative_to(root) and not candidate.is_relative_to(app.srcdir)
            if path and inside and candidate.exists():
                return str(candidate.relative_to(root))
    return ""


def setup(app: Sphinx) -> None:
    """Register the link resolver."""
    app.connect("doctree-read", resolve_links)
