"""A disk that is full, for tests of what is written then."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(num_bytes):
    """Let every write beyond ``num_bytes`` of a file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
