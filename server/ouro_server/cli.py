"""`ouro-serve`: what must be settled before anything heavy is imported, then `command.py`."""

import os
import re
import signal
import sys
from collections.abc import Sequence

from ouro_runtime.lean import lean
from ouro_server.run_folder import FOLDER

USAGE_ERROR = 2

SLIPS = (AttributeError, IndexError, KeyError, NameError, TypeError)
"""What Python raises where nobody foresaw a value: its text alone explains nothing."""
WHERE = "(VLLM_LOGGING_LEVEL=DEBUG shows where)"

_PYDANTIC = re.compile(r"\d+ validation errors? for .*\n")
_CHROME = re.compile(r"\n *For further information visit .*| \[type=.*\]$", re.MULTILINE)

# Here, since vLLM's processes import this file too, before they import vLLM.
lean()
if FOLDER in os.environ:
    # A process of a server: Ctrl-C in a terminal reaches it too, but the server's first process
    # ends it. vLLM sets a handler of its own when it has been imported.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Exit status 2, and one line, for what cannot be served; 1 for an engine
    that dies later."""
    # Python's own handler raises from wherever an import is, and prints where that was.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from ouro_server import command

        return command.main(argv)
    except Exception as error:
        if os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG":
            raise
        print(f"ouro-serve: error: {plain(error)}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    finally:
        signal.signal(signal.SIGINT, before)


def plain(error: Exception) -> str:
    """An error as one line: for a file, which one and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    # The text of a KeyError is the quoted key; some put a sentence there.
    sentence = isinstance(error, KeyError) and " " in str(error)
    text = one_line(str(error.args[0] if sentence else error))
    if text and (sentence or not isinstance(error, SLIPS)):
        return text
    kind = type(error).__name__
    return f"{kind}: {text} {WHERE}" if text else f"{kind} {WHERE}"


def one_line(text: str) -> str:
    """A message as one line; of pydantic's, which field and what is wrong with it."""
    if _PYDANTIC.search(text):
        text = _CHROME.sub("", _PYDANTIC.sub("", text))
        text = re.sub(r"\n(?=\S)", "; ", re.sub(r"\n +", ": ", text))
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
