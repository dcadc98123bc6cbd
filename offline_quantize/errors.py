"""The one exception that the command line prints without a traceback."""


class QuantizeError(Exception):
    """A request that cannot be carried out; the message names the file or tensor, the expectation and the value."""
