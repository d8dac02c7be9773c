"""Run the command line: ``persipubsub`` or ``python -m persipubsub``."""

import gc
import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """
    Run the command that the arguments of the process name.

    :return: exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted
    """
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"persipubsub: the command line needs {' and '.join(missing)}. Install it with: pip "
            f"install 'persipubsub[cli]'",
            file=sys.stderr)
        return 1
    try:
        # A short command is done before garbage is worth collecting: the collections while modules
        # are loaded, and the one at the exit, took a fifth of the time of "stat". Whoever loads a
        # command of click enables them again; "stat" in its plain forms ends by itself.
        gc.disable()
        # pylint: disable=import-outside-toplevel
        from persipubsub.cli import _plain
        code = _plain.run(sys.argv[1:])
        if code is None:
            import persipubsub.cli.commands
            code = persipubsub.cli.commands.main()
        return code
    except KeyboardInterrupt:
        # While it was still being loaded.
        print("persipubsub: interrupted", file=sys.stderr)
        return 130
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
