"""The rendezvous of the ranks of one machine: a store at the address that the recipe names, and nowhere else.

torchrun's own rendezvous listens on all interfaces and unpickles what it is sent, so whoever reaches its port runs
code. One machine has nothing to negotiate: the socket is bound here, to `run.rendezvous` (`127.0.0.1`, any free port,
unless told), and the store on it holds bytes. Several machines meet by a launcher of the user's own.
"""

import os
import socket

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from parallel.errors import UserError

NAME = "weft"


def listen(endpoint: str) -> socket.socket:
    """A socket that listens at `address:port`. Raises `UserError` if it cannot."""
    address, _, port = endpoint.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that a run has just left is free
        bound.bind(place)
        bound.listen(2048)
    except OSError as error:
        raise UserError(
            f"run.rendezvous={endpoint}: expected an address of this machine and a port that nobody uses (0: any); "
            f"{error.strerror or error}"
        ) from None
    return bound


class OneMachine(RendezvousHandler):
    """The ranks of this machine are all there are. Each start of them finds a store of its own, with nothing in it."""

    def __init__(self, params: RendezvousParameters) -> None:
        self.run_id, self.endpoint = params.run_id, params.endpoint
        self.store: dist.Store | None = None

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Ranks connect to the store, instead of opening one of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self.store = None  # lets go of the port
        with listen(self.endpoint) as bound:
            address, port = bound.getsockname()[:2]
            self.store = dist.TCPStore(
                address, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(bound.fileno())
            )
        alone = dist.HashStore()  # of the agent, which has no other agent to talk to
        return RendezvousInfo(alone, 0, 1, RendezvousStoreInfo(address, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register(NAME, OneMachine)
