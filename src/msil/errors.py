"""Errors that end a command with one printed sentence and an exit code: what is wrong, where, and what to do."""


class UserError(Exception):
    """What a user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A data set is missing, malformed or unsafe to read."""


class WeightsError(UserError):
    """Weights are missing, cannot be downloaded, or do not fit the net."""


class RunError(Exception):
    """A run that ended before its end, for no mistake of the user's. A subclass has its own exit code."""

    exit_code = 1
