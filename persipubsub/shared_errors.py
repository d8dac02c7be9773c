"""Errors of threads and tasks whose messages share a commit: each has one of its own."""


def copy_of(error: BaseException) -> BaseException:
    """
    Make another exception that says the same, with the first one as its cause.

    Each thread and each task needs one of its own: an exception that is raised in several gathers
    the tracebacks of all.
    """
    # Not copy.copy, which calls the class and fails if that wants other arguments.
    copied = error.__class__.__new__(error.__class__, *error.args)
    copied.__dict__.update(error.__dict__)
    copied.__cause__ = error
    return copied
