"""The watchdog: a rank that stops is named, by the rank beside it, before anybody's collective times out.

Each rank beats: a thread of its own changes the rank's value in the store that the launcher keeps. And each rank
listens to the next one, in a ring, so the cost is two small messages every few seconds wherever the rank sits. A value
that does not change for `SHARE` of `parallel.timeout_seconds` is that of a process which is stopped or gone; its
listener says so and ends the run, before gloo or NCCL give up on a collective without knowing whom they missed. Changes
are counted on the listener's own clock, so clocks need not agree.
"""

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from threading import Event, Thread

import torch.distributed as dist

from train.safety import failures

SHARE = 0.8  # of the time after which collectives give up
BEATS = 20  # in that time, or one every `SLOWEST` seconds
SLOWEST = 5.0
BYE = "bye"


class Silent(RuntimeError):
    """A rank, the `culprit`, has not been heard of for too long."""

    def __init__(self, culprit: int, message: str) -> None:
        super().__init__(message)
        self.culprit = culprit


class Watchdog:
    """Beats for `rank` and listens to the next of `world` ranks; begins at once, ends with `close`."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float) -> None:
        self.store, self.rank, self.next = store, rank, (rank + 1) % world
        self.timeout, self.limit = timeout_seconds, SHARE * timeout_seconds
        self.pause = min(SLOWEST, self.limit / BEATS)
        self.ended = Event()
        self.beats = 0
        self.heard, self.at = "", time.monotonic()  # the last news of the next rank
        self.thread = Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """This rank ends in good order."""
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        me = f"{os.getpid()} {socket.gethostname()}"
        try:
            while not self.ended.wait(self.pause):
                self.beats += 1
                self.store.set(str(self.rank), f"{self.beats} {me}")
                self._listen()
            self.store.set(str(self.rank), BYE)
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, Silent):
                give_up(error)
            # else the store is gone, and with it the launcher, which has asked this rank to stop

    def _listen(self) -> None:
        """Raise `Silent` if there has been no news of the next rank for too long."""
        news = self.store.get(str(self.next)).decode() if self.store.check([str(self.next)]) else ""
        if news != self.heard or news == BYE:
            self.heard, self.at = news, time.monotonic()
        elif (silence := time.monotonic() - self.at) > self.limit:
            _, pid, host = (news or "0 0 ?").split()
            if host == socket.gethostname():
                os.kill(int(pid), signal.SIGKILL)  # else it would hold its launcher up for another half a minute
            raise Silent(
                self.next,
                f"rank {self.next} (process {pid} on {host}) has not been heard of for {silence:.0f} s: it is stopped, "
                f"or its machine is gone (parallel.timeout_seconds={self.timeout:g})",
            )


def give_up(error: Silent) -> None:
    """End this process at once, whatever its other threads wait for."""
    if not failures.record(error):
        print(f"weft: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def start(timeout_seconds: float) -> Watchdog | None:
    """The watchdog of this process's rank, by a connection of its own to the launcher's store; None for a lone rank."""
    if dist.get_world_size() == 1 or "MASTER_ADDR" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=max(1.0, timeout_seconds))
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    named = dist.PrefixStore(f"weft/watchdog/{attempt}", store)
    return Watchdog(named, dist.get_rank(), dist.get_world_size(), timeout_seconds)
