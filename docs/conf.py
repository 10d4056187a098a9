"""The site. Sphinx reads the pages of this folder as they are; what is our own about it is in site/."""

import sys
from pathlib import Path

import functrans

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "site"))

project = "functrans"
release = version = functrans.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "links_in_docstrings",
    "sphinx.ext.napoleon",
    "pages_that_run",
    "titles_of_pages",
    "words_with_anchors",
]

root_doc = "index"
exclude_patterns = ["conf.py", "site", "pictures", "learn/*.py"]

# pages
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_custom_formats = {suffix: "pages_that_run.read" for suffix in (".md", ".py")}
nb_execution_mode = "off"  # pages_that_run does it
nb_ipywidgets_js = {}  # they would come from another host

# docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a class as a default is its name, and not a repr, which is no Python
maximum_signature_line_length = 100
napoleon_use_rtype = False
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", str(HERE / "site" / "python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable/", str(HERE / "site" / "torch.inv")),
}
nitpicky = True

html_theme = "furo"
html_title = "functrans"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
