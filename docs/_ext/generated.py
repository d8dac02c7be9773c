"""
Write parts of the reference from the code itself, so that they can not drift.

``.. config-keys:: Queue``
    A table of the keys of a class of :py:mod:`persipubsub.config`.

``.. command-line::``
    A section for each command.

``.. error-tree::``
    The tree of errors, as it is drawn in :py:mod:`persipubsub.errors`.
"""

import enum
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import click
import msgspec
import msgspec.structs

import persipubsub.cli.commands
import persipubsub.config
import persipubsub.errors

_LIMITS = {
    "gt": "more than {}",
    "ge": "from {}",
    "lt": "less than {}",
    "le": "to {}",
    "min_length": "length at least {}",
    "max_length": "length at most {}"
}

_NOUNS = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _parts(annotation: Any) -> "tuple[Any, msgspec.Meta]":
    """
    Split an annotation.

    :param annotation: of a field
    :return: the type, what is said about it; of several notes, the outermost that says something
    """
    notes: list[msgspec.Meta] = []
    while get_origin(annotation) is Annotated:
        annotation, *metas = get_args(annotation)
        notes += [meta for meta in metas if isinstance(meta, msgspec.Meta)]
    merged: dict[str, Any] = {}
    for name in ("description", "gt", "ge", "lt", "le", "min_length", "max_length"):
        merged[name] = next((value for note in notes if (value := getattr(note, name)) is not None),
                            None)
    return annotation, msgspec.Meta(**merged)


def _alternatives(annotation: Any) -> list[Any]:
    """
    Take ``None`` out of a union.

    :param annotation: of a value
    :return: the types that a value in the file can have
    """
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for kind in get_args(annotation) if kind is not types.NoneType]
    return [annotation]


def describe_type(annotation: Any) -> str:
    """
    Say of what type a value is.

    :param annotation: of the value
    :return: text for a cell of a table
    """
    kind, _ = _parts(annotation)
    alternatives = _alternatives(kind)
    if len(alternatives) > 1 or alternatives[0] is not kind:
        return " or ".join(map(describe_type, alternatives))
    origin = get_origin(kind)
    if origin in (tuple, list, frozenset, set):
        return f"list of {describe_type(get_args(kind)[0])}s"
    if origin is not None and issubclass(origin, Mapping):
        return f"object of {describe_type(get_args(kind)[1])}"
    if issubclass(kind, enum.Enum):
        return "string"
    if issubclass(kind, msgspec.Struct):
        return f"object, see {kind.__name__}"
    return _NOUNS[kind]


def _number(value: Any) -> str:
    """Show a number so that it can be read, and powers of two as such if they are large."""
    if isinstance(value, int) and value >= 1 << 16 and value & (value - 1) == 0:
        return f"2\\ :sup:`{value.bit_length() - 1}`"
    return f"{value:,}"


def describe_range(annotation: Any) -> str:
    """
    Say which values are allowed.

    :param annotation: of the value
    :return: text for a cell of a table; empty if there is no limit
    """
    kind, meta = _parts(annotation)
    alternatives = _alternatives(kind)
    if len(alternatives) > 1 or alternatives[0] is not kind:
        return " or ".join(filter(None, map(describe_range, alternatives)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"``{member.value}``" for member in kind)
    limits: list[str] = []
    for name, text in _LIMITS.items():
        value = getattr(meta, name)
        if value is not None:
            limits.append(text.format(_number(value)))
    return " ".join(limits)


def describe_default(field: msgspec.structs.FieldInfo) -> str:
    """
    Say what a missing key means.

    :param field: of the class
    :return: text for a cell of a table
    """
    if field.required:
        return "required"
    default = field.default
    if default is msgspec.NODEFAULT:
        default = field.default_factory() if callable(field.default_factory) else None
    if isinstance(default, enum.Enum):
        return f"``{default.value}``"
    if default in (None, ""):
        return "none"
    _, meta = _parts(field.type)
    if isinstance(default, (int, float)) and meta.ge is not None and default < meta.ge:
        # It stands for a missing key, and could not be written into the file.
        return "none"
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return f"``{default}``"


def config_table(kind: type[msgspec.Struct]) -> Iterator[str]:
    """
    Write the table of a class of the configuration.

    :param kind: class
    :return: lines of reStructuredText
    """
    yield ".. list-table::"
    yield "    :header-rows: 1"
    yield "    :widths: 22 14 24 12 40"
    yield ""
    rows = [["Key", "Type", "Values", "Default", "Meaning"]]
    for field in msgspec.structs.fields(kind):
        if field.encode_name == "identifier":
            # The key of the entry, and not a key in it.
            continue
        _, meta = _parts(field.type)
        rows.append([
            f"``{field.encode_name}``",
            describe_type(field.type),
            describe_range(field.type),
            describe_default(field), meta.description or ""
        ])
    for row in rows:
        for index, cell in enumerate(row):
            yield f"    {' ' if index else '*'} - {cell}"
    yield ""


def _prose(text: str) -> str:
    """Mark options in a text as such: two hyphens would become a dash."""
    return re.sub(r"(?<!\S)(--?[a-z][a-z-]*)", r"``\1``", text)


def command_sections(group: click.Group) -> Iterator[str]:
    """
    Write a section for each command.

    :param group: of the commands
    :return: lines of reStructuredText
    """
    for name, command in group.commands.items():
        context = click.Context(command, info_name=f"persipubsub {name}")
        yield from [name, "-" * len(name), ""]
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield from ["::", "", f"    {usage}", ""]
        text = inspect.cleandoc((command.help or "").replace("\b", ""))
        description, *examples = re.split(r"^Examples?:\n", text, maxsplit=1, flags=re.MULTILINE)
        yield from map(_prose, description.splitlines())
        yield ""
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and record[1] and parameter.name != "help":
                yield from [f"``{record[0]}``", f"    {_prose(record[1])}", ""]
        for example in examples:
            yield from ["::", ""]
            yield from (f"    {line.strip()}" for line in example.splitlines())
            yield ""


def error_tree() -> Iterator[str]:
    """
    Draw the tree of errors.

    :return: lines of reStructuredText
    """
    yield "::"
    yield ""
    text = inspect.getdoc(persipubsub.errors) or ""
    yield from (line for line in text.splitlines() if line.startswith("    "))
    yield ""


def expand(text: str) -> str:
    """
    Write what the directives of a page stand for.

    It is done before Sphinx parses the page. Directives of Sphinx were rejected: they would have to
    parse a second time, and could only be tried out where Sphinx is installed.

    :param text: of the page
    :return: text without them

    >>> "BusyTimeoutError" in expand(".. error-tree::")
    True
    """
    lines: list[str] = []
    for line in text.splitlines():
        name, _, argument = line.partition("::")
        if name == ".. config-keys":
            lines += config_table(getattr(persipubsub.config, argument.strip()))
        elif name == ".. command-line":
            lines += command_sections(persipubsub.cli.commands.commands)
        elif name == ".. error-tree":
            lines += error_tree()
        else:
            lines.append(line)
    return "\n".join(lines)


def setup(app: Any) -> dict[str, bool]:
    """
    Let Sphinx expand each page that it reads.

    :param app: Sphinx
    :return: what it has to know
    """

    def expand_page(_app: Any, _name: str, source: list[str]) -> None:
        source[0] = expand(source[0])

    app.connect("source-read", expand_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
