"""One call of the command line, from arguments to exit code."""

import os
import sys
import threading
import traceback

import typer

from redundancy_trace.cli.app import app
from redundancy_trace.cli.printing import say
from redundancy_trace.errors import TraceError

INTERRUPTED = 130
_INTERRUPTED_TEXT = "trace: interrupted; what was finished is stored. Give the same command again to go on."


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 some checkpoints failed or a fault, 2 bad input, 130 interrupted."""
    # Before torch is loaded: threads that wait for each other busily are many times slower where others compute too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(sys.argv[1:] if arguments is None else arguments)
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        # A download that waits for a busy server: what it fetched is deleted, and the interpreter would wait for it.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="trace")
    except TraceError as error:
        say(f"trace: {error}")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say(_INTERRUPTED_TEXT)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone; nothing is left to flush to
        return 0
    except Exception as error:
        if (show := getattr(error, "show", None)) is not None:  # what the command-line parser refuses
            show()
            if "No such command" in str(error) and "Did you mean" not in str(error):
                say("To sweep a model, name it: trace --model REPO or trace --model FOLDER.")
            return int(getattr(error, "exit_code", 2))
        traceback.print_exc()
        say("trace: this is a fault of the program, not of your input; please report it with the lines above.")
        return 1
    if result == INTERRUPTED:  # the parser turns a KeyboardInterrupt into this
        say(_INTERRUPTED_TEXT)
    return result if isinstance(result, int) else 0
