"""The one exception a user is meant to see."""


class Fault(Exception):
    """Something a person can put right; its message is one sentence that names the thing and the way out.

    The command line prints a Fault as a single line. Every other exception is a defect of ours and keeps its traceback.
    """
