"""Configure Sphinx: ``python -m sphinx -n -W -b html docs OUTPUT``."""

import pathlib
import sys

import persipubsub

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "_ext"))

# Sphinx prescribes these names.
# pylint: disable=redefined-builtin

project = "persipubsub"
author = "persipubsub developers"
copyright = "2026, persipubsub developers"
release = persipubsub.__version__
version = release

# The last one is in _ext: it writes the tables of the configuration and of the command line.
extensions = ["sphinx.ext.autodoc", "sphinx_icontract", "generated"]

# As written in the source: contracts and sections of a module belong together.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}

# Every name that is referred to must exist, with three exceptions. Names of other projects (dotted,
# not ours) are not looked up: that needs their inventories from the network, and the build must not
# depend on it. Names of private modules have no page. Sphinx takes Annotated for a name of ours.
nitpick_ignore_regex = [
    ("py:.*", r"(?!persipubsub\.)[a-z_]\w*\..*"),
    ("py:.*", r"persipubsub\.(\w+\.)?_.*"),
    ("py:class", r"(persipubsub\.\w+\.)?Annotated"),
    # A small number in an annotation.
    ("py:class", r"\de-\d+"),
]

# What is not said to be Python is none: drawings, commands.
highlight_language = "text"

html_theme = "furo"
html_title = f"persipubsub {release}"

exclude_patterns = ["_build"]
