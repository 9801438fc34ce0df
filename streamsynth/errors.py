"""The exceptions with a meaning of their own: "the user can mend this", and "stopped as asked"."""


class UserError(Exception):
    """A problem the user can mend, said in one clear sentence.

    The sentence names the key, file or line and the mend. The command prints it without a
    traceback and exits with code 2.
    """


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), has saved what there is, and goes on with the same command.

    The command prints the sentence and exits with code 75, EX_TEMPFAIL of sysexits.h: try again.

    agreed: whether all processes of the run stop at this very place, and not this one alone.
    """

    def __init__(self, message: str, agreed: bool = True):
        super().__init__(message)
        self.agreed = agreed
