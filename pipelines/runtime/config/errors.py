"""ConfigError, for mistakes that the user can mend, with the context manager that names the key, and Stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_NAME = 300  # characters of a path


class ConfigError(Exception):
    """A user's mistake: the message says what, why, and what to do. The program ends with exit code 2."""


class Stopped(Exception):
    """The command was asked to stop and has committed what it did. The program ends with exit code 75."""


def sentence(error: OSError) -> str:
    """Return what the operating system refused, without its number."""
    if error.filename is None or not error.strerror:
        return str(error)
    name = str(error.filename)
    return f"{name[:LONGEST_NAME]}{'...' * (len(name) > LONGEST_NAME)}: {error.strerror}"


@contextmanager
def config_error_at(key: str) -> Iterator[None]:
    """Turn a ValueError or OSError of the layers below into a ConfigError about ``key``: the user can mend it there."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {sentence(error) if isinstance(error, OSError) else error}") from error
