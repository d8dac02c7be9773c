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

# The last one is in _ext.
extensions = [
    "sphinx.ext.autodoc", "sphinx_icontract", "sphinx_click", "sphinx_copybutton", "config_keys"
]

# Copied without prompts, and without what commands print.
copybutton_prompt_text = r"\$ |> |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

# As written in the source: contracts and sections of a module belong together.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

# Every name that is referred to must exist, with some exceptions. Names of other projects (dotted,
# not ours) are not looked up: that needs their inventories from the network, and the build must not
# depend on it. Names of modules that users do not import have no page. Sphinx takes Annotated for a
# name of ours, and names that a module imports for its annotations only for names without a module.
nitpick_ignore_regex = [
    ("py:.*", r"(?!persipubsub\.)[a-z_]\w*\..*"),
    ("py:.*", r"persipubsub\.(engine|face|lmdb_engine|\w+\._\w+)(\..*)?"),
    ("py:class", "ListedDeadLetter|Moved|Sizes"),
    ("py:class", r"(persipubsub\.\w+\.)?Annotated"),
    # A small number in an annotation.
    ("py:class", r"\de-\d+"),
]

# Quotes and ellipses, but no dashes: they would spoil options in the help of commands.
smartquotes_action = "qe"

# What is not said to be Python is none: drawings, commands.
highlight_language = "text"

# For "python -m sphinx -b man docs OUTPUT".
man_pages = [("reference-commands", "persipubsub", "deploy, watch and maintain queues", author, 1)]

html_theme = "furo"
html_title = f"persipubsub {release}"

exclude_patterns = ["_build"]
