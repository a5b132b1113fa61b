"""Settings of Sphinx: ``bash scripts/docs.sh`` builds the site, and fails on any warning."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "spo_lightning"
author = "the spo_lightning authors"
release = version = installed_version("spo-lightning")
html_title = f"spo_lightning {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "source_pages",
]
root_doc = "index"
exclude_patterns = ["_build", "_ext"]

# Markdown as GitHub reads it: headings are targets by GitHub's rule, ```math is an equation.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = {"math"}
myst_heading_anchors = 4
myst_url_schemes = {
    "http": None,
    "https": None,
    "source": "source/{{path}}.html#{{fragment}}",  # see source_pages
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r"^\$ "
copybutton_prompt_is_regexp = True

linkcheck_ignore = [r"http://127\.0\.0\.1.*", "source/"]  # the reader's own MLflow; pages of this site
linkcheck_timeout = 20
