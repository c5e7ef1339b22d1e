"""The benchmark behind ``tinyfuse bench``: stock variants and tinyfuse side by side, in one run."""

# Some of the presets, for the help, which imports nothing else.
PRESETS, ENCODERS = "llama-2-7b, llama-3.2-1b, ...", "minilm, whisper-tiny, whisper-base"


class UsageError(ValueError):
    """A request that cannot be served; the message is one line and names the fix."""
