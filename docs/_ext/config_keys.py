"""Write the tables of the configuration from its JSON Schema, and publish the schema."""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import persipubsub.config

_LIMITS = {
    "minimum": "from {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "to {}",
    "minItems": "at least {}"
}


def _number(value: float) -> str:
    """Show a number so that it can be read, and large powers of two as such."""
    if isinstance(value, int) and value >= 1 << 16 and value & (value - 1) == 0:
        return f"2\\ :sup:`{value.bit_length() - 1}`"
    return f"{value:,}"


def _values(kind: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Say which values a key takes."""
    if "$ref" in kind:
        part = parts[kind["$ref"].rpartition("/")[2]]
        return ", ".join(f"``{value}``"
                         for value in part["enum"]) if "enum" in part else "see below"
    if "anyOf" in kind:
        return " or ".join(_values(one, parts) for one in kind["anyOf"])
    if kind["type"] == "array":
        return f"list of {kind['items']['type']}s"
    limits = [text.format(_number(kind[key])) for key, text in _LIMITS.items() if key in kind]
    return " ".join([kind["type"], *limits])


def table(name: str) -> Iterator[str]:
    """
    Write the table of an object of the file.

    :param name: ``Entry``, ``Queue`` or ``HighWaterMark``
    :return: lines of reStructuredText
    """
    parts = persipubsub.config.schema()["$defs"]
    yield from [".. list-table::", "    :header-rows: 1", "    :widths: 24 26 14 36", ""]
    rows = [("Key", "Values", "Default", "Meaning")]
    for key, kind in parts[name]["properties"].items():
        default = "" if isinstance(kind.get("default"), dict) else kind.get("default")
        if key in parts[name].get("required", ()):
            default = "required"
        elif default not in (None, ""):
            default = f"``{default:g}``" if isinstance(default, float) else f"``{default}``"
        rows.append((f"``{key}``", _values(kind, parts), default or "none", kind["description"]))
    for row in rows:
        for index, cell in enumerate(row):
            yield f"    {' ' if index else '*'} - {cell}"
    yield ""


def expand(text: str) -> str:
    """
    Write what ``.. config-keys:: NAME`` of a page stands for.

    :param text: of the page
    :return: text with the tables

    >>> "from 1 to 65,535" in expand(".. config-keys:: Queue")
    True
    """
    return re.sub(r"^\.\. config-keys:: (\w+)$",
                  lambda match: "\n".join(table(match.group(1))),
                  text,
                  flags=re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    """
    Let Sphinx expand each page that it reads, and write the schema beside the pages.

    :param app: Sphinx
    :return: what it has to know
    """

    def expand_page(_app: Any, _name: str, source: list[str]) -> None:
        source[0] = expand(source[0])

    def write_schema(_app: Any, _error: Exception | None) -> None:
        path = pathlib.Path(app.outdir) / "config.schema.json"
        path.write_text(json.dumps(persipubsub.config.schema(), indent=2), encoding="utf-8")

    app.connect("source-read", expand_page)
    app.connect("build-finished", write_schema)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
