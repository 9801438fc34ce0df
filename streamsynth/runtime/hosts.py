"""The processes of a run: who this one is, what they tell each other, and how they end.

Every process runs the same program on the same facts, so that all that lies on the host (patterns, scheduler,
what is kept) is there on each of them. Work that is done once (a prompt rendered, a text judged) is
shared out, and what comes of it is gathered. Process 0 alone writes files.

A run of one process needs none of this: everything here then does nothing, or the plain thing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from streamsynth.errors import Stopped, UserError
from streamsynth.runtime import line as line_lib
from streamsynth.runtime.line import Line

# Exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h.
STOPPED = 75

_CONNECT_SECONDS = 60.0
_CPU_THREADS = 32
_ADDRESS_BYTES = 1024
_ECHO_SECONDS = 1.0

_line: Line | None = None
_stop_asked = threading.Event()


def count() -> int:
    """How many processes there are."""
    return 1 if _line is None else _line.count


def index() -> int:
    """Which of them this one is."""
    return 0 if _line is None else _line.index


def first() -> bool:
    """Whether this is the process that writes."""
    return index() == 0


# --- What processes tell each other. All of them must come by in the same order. ---


def gather(what: str, own: Any) -> list[Any]:
    """What every process gives, in their order: see `Line.gather`."""
    return [own] if _line is None else _line.gather(what, own)


def from_first(what: str, make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, which alone calls it: of JSON and numpy arrays."""
    if _line is None:
        return make()
    return _line.gather(what, make() if _line.index == 0 else None)[0]


def first_before_others(what: str, make: Callable[[], Any]) -> Any:
    """What `make` returns in each process; the others call it after process 0, and find what that left."""
    if not first():
        wait(what)
    made = make()
    if first():
        wait(what)
    return made


def agree(facts: Mapping[str, Any]) -> None:
    """Compares what the processes were started on.

    Args:
      facts: numbers and strings by what they are of, such as "config".

    Raises:
      UserError: naming a process that has another one than process 0; in all of them.
    """
    found = gather("what the run is", dict(facts))
    for process, own in enumerate(found):
        for name in sorted(own.keys() | found[0].keys()):
            if own.get(name) != found[0].get(name):
                raise UserError(
                    f"process {process} has another {name} than process 0: start the same command on every "
                    "host, with the same files."
                )


def wait(what: str) -> None:
    """Goes on when all processes are here."""
    gather(what, None)


def share(size: int) -> slice:
    """This process's part of `size` things in a row: each is in the part of exactly one."""
    return slice(index() * size // count(), (index() + 1) * size // count())


def joined(what: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of all processes put together.

    Args:
      what: see `gather`.
      own: lists, and arrays that are joined along their first axis, by name: of this process's `share`.
    """
    if _line is None:
        return dict(own)
    parts = _line.gather(what, own)

    def join(name: str, example: Any) -> Any:
        found = [part[name] for part in parts]
        if isinstance(example, np.ndarray):
            return np.concatenate(found)
        return [item for part in found for item in part]

    return {name: join(name, example) for name, example in own.items()}


def tick() -> None:
    """Says that the run has made progress: without any for `hosts.stall_seconds` stacks are printed."""
    if _line is not None:
        _line.tick()


@contextlib.contextmanager
def local() -> Iterator[None]:
    """Within it JAX computes on this process's first device, whatever the other processes do."""
    if _line is None:
        yield
        return
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("own",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield


# --- How a run ends ---


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM asks the run to stop at its next step instead of ending the process.

    In a thread that is not the main one it does nothing, as Python allows no more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        _stop_asked.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        _stop_asked.clear()


def stop_heard() -> bool:
    """Whether this process was asked to stop, or of another one has been heard, a moment later, that it was.

    For where process 0 works and the others wait for it. It is asked by that one alone.
    """
    return _stop_asked.is_set() or (_line is not None and _line.stop_heard)


def stop_asked(what: str, facts: Any = None) -> bool:
    """Whether any process was asked to stop: the same answer on all of them.

    Args:
      what: the place in the program, such as "step 12".
      facts: of the state on the host, that must be the same everywhere. Where it is not, the processes have
        parted, and all end.
    """
    if _line is None:
        return _stop_asked.is_set()
    found = gather(what, {"stop": _stop_asked.is_set(), "facts": facts})
    for process, one in enumerate(found):
        if one["facts"] != found[0]["facts"]:
            raise RuntimeError(
                f"{what}: the state of process {process} is not that of process 0: "
                f"{one['facts']} and {found[0]['facts']}"
            )
    return any(one["stop"] for one in found)


@contextlib.contextmanager
def together(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Joins the processes of a run; within it, what ends one of them ends all.

    To be entered before anything asks JAX for its devices.

    Args:
      coordinator: HOST:PORT of process 0; None where JAX detects all three (Cloud TPU, Slurm, Open MPI).
      processes: how many.
      process_id: which of them this one is.

    Raises:
      UserError: the processes do not find each other.
    """
    global _line
    # XLA's CPU client has as many threads as this says, by default one a core. Each simulated device blocks
    # one in a collective: with too few, two programs wait for each other for ever. Accelerators need none.
    os.environ.setdefault("NPROC", str(max(_CPU_THREADS, os.cpu_count() or 1)))
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes of the run did not find each other ({reason}): start the same command on every "
            "host, and where nothing is detected name --coordinator=HOST:PORT, --processes and --process_id."
        ) from error
    if threading.current_thread() is threading.main_thread():
        # JAX has taken SIGTERM for a notice of its own: who does not ask for `stop_on_sigterm` ends by it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_count() == 1:
        yield
        return
    _line = _connected(coordinator)
    try:
        yield
        wait("the end")
    except Stopped as stopped:
        if not stopped.agreed:
            _fail(str(stopped), STOPPED)
        _leave()
        raise
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BaseException as error:
        traceback.print_exc()
        # It may be but the echo of another process's end in a device's collective: that would be said now.
        time.sleep(_ECHO_SECONDS)
        _fail(f"{type(error).__name__}: {error}", 1)
    else:
        _leave()


def watch(stall_seconds: float) -> None:
    """From now on a run without progress for so long prints its stacks."""
    if _line is not None:
        _line.stall = stall_seconds


def _leave() -> None:
    global _line
    _line.close()
    _line = None
    jax.distributed.shutdown()


def _fail(message: str, code: int) -> None:
    """Ends this process, and with it the others. JAX's own way out would wait for them."""
    print(f"streamsynth: error: {message}", file=sys.stderr, flush=True)
    _line.fail(message, code)
    sys.stdout.flush()
    os._exit(code)


def _connected(coordinator: str | None) -> Line:
    """The line; process 0 says over the devices where it listens, and what callers must know."""
    me, processes = jax.process_index(), jax.process_count()
    told, listener = "", None
    if me == 0:
        listener = socket.create_server(("", 0), backlog=processes)
        found = {"hosts": _own_addresses(), "port": listener.getsockname()[1], "token": secrets.token_hex(16)}
        told = json.dumps(found)
    blank = np.zeros(_ADDRESS_BYTES, np.uint8)
    blank[: len(told)] = np.frombuffer(told.encode(), np.uint8)
    said = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(blank))).rstrip(b"\0"))
    hosts, port, token = said["hosts"], said["port"], said["token"]
    if coordinator is not None:  # an address that is known to be reached
        hosts = [coordinator.rpartition(":")[0].strip("[]"), *hosts]
    try:
        if listener is not None:
            with listener:
                sockets = line_lib.host(processes, token, listener, _CONNECT_SECONDS)
        else:
            sockets = {0: line_lib.call([(name, port) for name in hosts], me, token, _CONNECT_SECONDS)}
    except OSError as error:
        raise UserError(
            f"process {me} has no connection to {f'process {error}' if me == 0 else 'process 0'}: the hosts "
            f"must reach each other over TCP (tried {', '.join(hosts)}, port {port})."
        ) from error
    return Line(me, processes, sockets, stopping=_stop_asked.is_set)


def _own_addresses() -> list[str]:
    """Names and addresses by which other hosts may reach this one, the likeliest first."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it asks which interface leads out
        found.append(probe.getsockname()[0])
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(name))
    found.append(name)
    return list(dict.fromkeys(found))
