"""What of vLLM's log would only repeat, at length, the line that says why a server ended."""

import logging
import os
from pathlib import Path

from ouro_server.run_folder import FOLDER, serves


class NoEcho(logging.Filter):
    """Drops errors of a start that fails, and of the API process the traces of an engine's death.

    While it serves, what an engine says before it dies stays: that trace is the cause.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        folder = os.environ.get(FOLDER)
        if folder is None or record.levelno < logging.ERROR:
            return True
        error = record.exc_info[1] if record.exc_info else None
        return type(error).__name__ != "EngineDeadError" and serves(Path(folder))
