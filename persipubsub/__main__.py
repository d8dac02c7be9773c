"""Run the command line: ``persipubsub`` or ``python -m persipubsub``."""

import sys

__all__ = ["main"]


def main() -> int:
    """
    Run the command that the arguments of the process name.

    :return: exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted
    """
    try:
        import persipubsub.cli.commands  # pylint: disable=import-outside-toplevel
        return persipubsub.cli.commands.main(sys.argv[1:])
    except ModuleNotFoundError as error:
        print(
            f"persipubsub: the command line needs {error.name}. Install it with: pip install "
            "'persipubsub[cli]'",
            file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # While it was still being loaded.
        print("persipubsub: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
