"""How Sphinx makes a site of the project's documents and docstrings: `make site`."""

from importlib.metadata import version as installed

project = "Ouroboros"
version = release = installed("ouroboros-lm")
copyright = "the authors of Ouroboros, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The source is the project's root, so that links between README, CONTRIBUTING and the pages are those of the files.
root_doc = "docs/site/contents"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "ablations/**"]
exclude_patterns = [".*", "build", "dist", "out", "pretrained", "runs", "src", "tests"]  # not even looked into
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "alabaster"
html_theme_options = {"description": "Language models that reuse their weights", "page_width": "60rem"}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_copy_source = False
