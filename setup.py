"""
Describe the distribution for pip and build.

Everything that other tools could disagree with is said only once: the version in
``persipubsub/__init__.py``, what a user reads in ``README.rst``.
"""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).resolve().parent


def _read_version() -> str:
    """
    Return the version that the package states.

    The file is read and not imported: the dependencies are not there yet when the package is built.

    :return: the version, three numbers with dots
    """
    pth = _HERE / "persipubsub" / "__init__.py"
    match = re.search(r'^__version__ = "([^"]+)"$', pth.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'Expected a line __version__ = "..." in {pth}, but there is none.')

    return match.group(1)


# The address of the project, and the only place where it is written down.
_URL = "https://github.com/persipubsub/persipubsub"


def _read_description() -> str:
    """
    Return README.rst with absolute links: a package index knows no files of the repository.

    :return: text
    """
    text = (_HERE / "README.rst").read_text(encoding="utf-8")
    return re.sub(r"<(?!https?:)([\w./-]+)>`_", rf"<{_URL}/blob/main/\1>`_", text)


_EXAMPLES = ["protobuf>=5", "rich>=13"]

_CLI = ["click>=8.2"]

_NATS = ["nats-py[nkeys]>=2.9,<3"]

_METRICS = ["prometheus-client>=0.20"]

setuptools.setup(
    name="persipubsub",
    version=_read_version(),
    description="Persistent publish and subscribe between the processes of one machine, "
    "without a broker.",
    long_description=_read_description(),
    long_description_content_type="text/x-rst",
    author="persipubsub developers",
    license="MIT",
    project_urls={
        "Documentation": f"{_URL}/blob/main/docs/index.rst",
        "Changes": f"{_URL}/blob/main/CHANGELOG.rst",
        "Issues": f"{_URL}/issues",
        "Source": _URL,
    },
    license_files=["LICENSE"],
    keywords="publish subscribe queue persistent durable lmdb ipc interprocess",
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    packages=setuptools.find_packages(include=["persipubsub", "persipubsub.*"]),
    package_data={"persipubsub": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["lmdb>=3,<4", "icontract>=2.6", "msgspec>=0.18"],
    entry_points={"console_scripts": ["persipubsub = persipubsub.__main__:main"]},
    extras_require={
        # The command persipubsub.
        "cli": _CLI,
        # persipubsub.metrics and the command "persipubsub metrics".
        "metrics": _METRICS,
        # Queues with the path nats://..., for more than one machine.
        "nats": _NATS,
        # What examples/ imports beyond the library.
        "examples": _EXAMPLES,
        # The peers that benchmarks/ measures beside the library, and what draws the results.
        "bench": [
            "diskcache>=5.6",
            "honker>=0.5",
            "litequeue>=0.9",
            "localqueue>=1.4",
            "matplotlib>=3.9",
            "nque>=1",
            "persist-queue>=1.1",
            "rich>=13",
            "simplebroker>=8",
        ],
        # What docs/ is built with; it imports all that is documented.
        "doc": _CLI + _METRICS + _NATS + [
            "furo",
            "rich>=13",
            "sphinx>=8",
            "sphinx-click>=6",
            "sphinx-copybutton>=0.5",
            "sphinx-icontract>=2",
        ],
        # All that the tests and precommit.py need; the examples are tested, too.
        "dev": _EXAMPLES + _CLI + _METRICS + _NATS + [
            "build",
            "codespell>=2.4",
            "hypothesis>=6",
            "isort>=6",
            "jsonschema>=4",
            "mypy>=1.15",
            "pydocstyle>=6.3",
            "pylint>=3.3",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "tox>=4.20",
            "twine>=6.1",
            "types-jsonschema",
            "types-protobuf",
            "types-setuptools",
            "uvloop>=0.21",
            "yapf>=0.43",
        ],
    },
)
