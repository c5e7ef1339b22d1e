"""The benchmark behind ``tinyfuse bench``: stock variants and tinyfuse side by side, in one run."""


class UsageError(ValueError):
    """A request that cannot be served; the message is one line and names the fix."""
