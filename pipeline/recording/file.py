"""The file of `--record`: the launcher opens it, and each GPU process adds a segment (`workers/gpu/recording`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Final

from ipc.errors import ConfigError
from pipeline.environment.claimed_file import open_claimed
from workers.gpu.recording.frames import FILE_START

DEFAULT_RECORD_LIMIT_GB: Final = 2.0


@contextmanager
def recording_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Open an empty recording. Yields its descriptor, for GPU processes.

    Only the user of the engine may read a new file, because it holds prompts and answers. Raises ConfigError if the
    file cannot be written.
    """
    with closing(open_claimed(path, "--record", is_read_too=True, permissions=0o600)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"--record {os.fspath(path)}: is no regular file: choose another path")
        try:
            file.write(FILE_START)
        except OSError as error:
            raise ConfigError(f"--record {os.fspath(path)}: cannot be written: {error.strerror}") from None
        yield file.fileno()
