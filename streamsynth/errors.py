"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A problem the user can mend, said in one clear sentence.

    The sentence names the key, file or line and the mend. The command prints it without a
    traceback and exits with code 2.
    """
