"""The exception for a request that cannot be carried out; the command line prints it, like ValueError and OSError, without a traceback."""


class QuantizeError(Exception):
    """A request that cannot be carried out; the message names the file or tensor, the expectation and the value."""
