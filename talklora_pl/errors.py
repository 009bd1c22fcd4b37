"""The one exception for a user's mistake: the command line prints its message without a traceback and exits with 2."""


class UserError(Exception):
    """A mistake in a config, a data row, an adapter file, a checkpoint or a name.

    The message names the place and the remedy.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show: the message is all that helps."""
        return [f"{type(self).__name__}: {self}"]


def in_a_line(error: BaseException) -> str:
    """The kind of an error of somebody else's code, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
