"""The one exception type whose message is written for the user: what is wrong and the way out, in one line."""


class HeadscopeError(Exception):
    """Bad input or an unsupported situation. The command line prints the message and exits with code 2."""
