"""Run the command line: ``persipubsub`` or ``python -m persipubsub``."""

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """
    Run the command that the arguments of the process name.

    :return: exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted
    """
    if importlib.util.find_spec("click") is None:
        print(
            "persipubsub: the command line needs click. Install it with: pip install "
            "'persipubsub[cli]'", file=sys.stderr)
        return 1
    try:
        import persipubsub.cli.commands  # pylint: disable=import-outside-toplevel
        return persipubsub.cli.commands.main(sys.argv[1:])
    except KeyboardInterrupt:
        # While it was still being loaded.
        print("persipubsub: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
