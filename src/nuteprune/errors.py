"""The errors that a user can cause and can mend."""


def reason(error: BaseException, length: int = 300) -> str:
    """What a library's error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


class NutePruneError(Exception):
    """A problem that the user can mend; its text is one sentence that says what, where and what to do.

    The command line prints the text alone and exits with code 2.
    """


class ConfigError(NutePruneError, ValueError):
    """An option has a value that is not allowed."""


class ArchitectureError(NutePruneError):
    """A model that cannot be pruned exactly, or whose family is not described."""


class DataError(NutePruneError):
    """Text that cannot be read, or too little of it."""


class TrainingError(NutePruneError):
    """A run that cannot go on; the last good checkpoint is kept."""


class DiskFullError(NutePruneError, OSError):
    """No room for a file; what was there before is as it was."""


class ExportError(NutePruneError):
    """A compact model that does not equal the masked one, or cannot be written."""


class MeasurementError(NutePruneError):
    """A process that was to be measured ended before its result."""
