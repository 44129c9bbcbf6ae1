"""How Sphinx builds the documentation: `make docs`."""

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for autodoc, which reads the docstrings

metadata = configparser.ConfigParser()
metadata.read(ROOT / "setup.cfg")

project = "Flask-GSession"
author = metadata["metadata"]["author"]
copyright = f"2026, {author}"
release = metadata["metadata"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build", "benchmarks/table.md", "reliability-table.md"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

# A copied line of a shell comes without its prompt, and without what was printed.
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["charts.css", "code.css", "tables.css"]
html_theme_options = {"navigation_with_keys": True}


# Nobody calls these: Flask makes a SessionData, and the rest is raised or inherited.
UNCALLED = {"SessionData", "SessionConflict", "SessionEnded", "Store"}


def setup(app):
    """Leave out the signatures of `UNCALLED`."""
    app.connect(
        "autodoc-process-signature",
        lambda app, what, name, *rest: ("", "") if name.split(".")[-1] in UNCALLED else None,
    )
