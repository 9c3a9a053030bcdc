"""Running a function in a fresh process and reading that process's peak memory.

A process of its own makes the figure one of the function alone: neither what the caller holds nor what its allocator
kept of earlier work is in it. Call and answer are pickled through pipes between the two; no pickle is written to or read
from a file.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nuteprune.errors import MeasurementError, NutePruneError, reason
from nuteprune.quiet import quiet_libraries

T = TypeVar("T")
Progress = Callable[[int, int], None]

# The parent's module search path comes first, so that the child finds this package wherever the parent did.
_START = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from nuteprune.measuring import _serve; _serve()"


def in_fresh_process(
    function: Callable[..., T], *args: Any, progress: Progress | None = None, advice: str = "take a smaller model or batch"
) -> tuple[T, int]:
    """Calls a function in a fresh Python process.

    Args:
        function: a function at the top level of an importable module (not of the main script).
        *args: its arguments; they and the result must be picklable.
        progress: if given, the function gets a keyword argument `progress` whose calls arrive here.
        advice: what to do when memory runs out, for the error.

    Returns:
        What the function returned, and the process's peak resident memory in bytes, interpreter and imports included.

    Raises:
        NutePruneError: the function raised it.
        MeasurementError: the process was killed, as the system does when memory runs out.
        RuntimeError: the function raised any other error; the text is its traceback.
        ValueError: the function cannot be imported by another process.
    """
    with FreshProcess(advice) as process:
        return process.call(function, *args, progress=progress)


class FreshProcess:
    """A fresh Python process that runs functions one after the other; use it as a context manager.

    What a function leaves in its module is there for the next one.

    Args:
        advice: what to do when memory runs out, for the error.
    """

    def __init__(self, advice: str = "take a smaller model or batch") -> None:
        self._advice = advice

    def __enter__(self) -> FreshProcess:
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the child.
        self._child = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._child.stdin is not None
        self._child.stdin.write(pickle.dumps(sys.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._child.kill()
        try:  # the child ends when its pipe is closed
            self._child.__exit__(kind, None, None)
        except BrokenPipeError:  # it is gone, with a call unread
            self._child.wait()

    def call(self, function: Callable[..., T], *args: Any, progress: Progress | None = None) -> tuple[T, int]:
        """Calls a function in the process; as `in_fresh_process`."""
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(f"{function.__qualname__} must stand at the top level of a module that can be imported")
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            pickle.dump((function, args, progress is not None), child.stdin)
            child.stdin.flush()
            while True:
                kind, value = pickle.load(child.stdout)
                if kind == "progress":
                    assert progress is not None
                    progress(*value)
                elif kind == "result":
                    return value  # type: ignore[no-any-return]
                elif kind == "error":
                    raise value
                elif kind == "memory":
                    raise MeasurementError(f"the device's memory is full; {self._advice}.")
                else:
                    raise RuntimeError(f"{function.__qualname__} failed in its process:\n{value}")
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            try:
                code = child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
            raise MeasurementError(_death(code, self._advice)) from error


def _death(code: int, advice: str) -> str:
    """What became of a process that ended without a word."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return f"the measuring process was killed, most likely because the machine's memory ran out; {advice}."
    return f"the measuring process ended with code {code} before its result; its own messages stand above."


def _serve() -> None:
    """The child's side: reads calls from stdin, answers on stdout."""
    quiet_libraries()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            pickle.dump((kind, value), answers)
            answers.flush()

    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(calls,), daemon=True).start()
    while True:
        function, args, reports = calls.get()
        try:
            own = {"progress": lambda done, total: send("progress", (done, total))} if reports else {}
            result = function(*args, **own)
            send("result", (result, peak_memory()))
        except NutePruneError as error:
            send("error", error)
        except OSError as error:
            text = f"the measuring process failed: {reason(error)}; if the disk is full, set TMPDIR to a folder with more room."
            send("error", MeasurementError(text))
        except BaseException as error:
            # torch's error on a GPU and on a CPU; torch itself is not imported here
            full = type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)
            send("memory" if full else "failed", traceback.format_exc())


def _listen(calls: queue.SimpleQueue[Any]) -> None:
    """Hands calls on; ends this process when the parent is done or gone, which closes stdin."""
    try:
        while True:
            calls.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)
    except BaseException:  # a call that this process cannot read
        traceback.print_exc()
        os._exit(1)


def forget_peak_memory() -> bool:
    """Begins to count this process's peak memory anew, from what it holds now; False where the system has no way to."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_now() -> int | None:
    """Resident memory of this process now, bytes; None where the system does not say."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """A field of what Linux says of this process's memory, bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    if (most := _status("VmHWM")) is not None:  # not getrusage: there a process starts with the peak of the one that made it
        return most
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
