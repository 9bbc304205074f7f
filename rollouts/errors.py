"""The exceptions that people are meant to read: a single line that says what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad input from a person: a file, a recipe, a flag, a device.

    The message is one line with three parts: what is wrong, where, what to do about it. The command
    line prints it as ``error: <message>`` and exits with code 2; nothing may have been half-written
    when it is raised. Bugs in our own code are never a ``UserError``.
    """


class RunError(RuntimeError):
    """A run that failed on the way, for a reason outside the program. The message is one line; exit code 1."""
