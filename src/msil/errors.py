"""What a user can mend: every message is one clear sentence saying what is wrong, where, and what to do."""


class UserError(Exception):
    """Base of the errors that end a command with exit code 2 and one printed sentence, no traceback."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A data set is missing, malformed or unsafe to read."""


class WeightsError(UserError):
    """Weights are missing, cannot be downloaded, or do not fit the net."""
