"""The one exception a user is meant to see."""

from data.redaction import redacted


class Fault(Exception):
    """Something a person can put right; its message is one sentence that names the thing and the way out.

    The command line prints a Fault as a single line, below ``trace``: the traceback of a user's own code, where that
    failed in another process. Every other exception is a defect of ours and keeps its traceback. Neither tells what is
    private in a URL.
    """

    code = 1
    """What the process ends with; 2 for a mistake of the command line, which is said before anything is looked at."""

    def __init__(self, message: object = "", trace: str = "") -> None:
        super().__init__(redacted(str(message)))
        self.trace = redacted(trace)


class Notice(UserWarning):
    """Something a person should know and that stops nothing, from where there is nobody to say it to; the command line
    prints it as a line."""
