"""A TCP relay on loopback, which can slow down and cut what goes through it."""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer
from types import TracebackType

BLOCK = 8192  # bytes carried at once


class Relay:
    """A context in which connections to `port` are carried to port `to` of this machine.

    `rate` bounds the bytes per second of each connection towards `to`, of which `up` counts those of all.
    """

    def __init__(self) -> None:
        self.to, self.rate, self.up, self.is_cut = 0, math.inf, 0, False
        self.open: set[socket.socket] = set()
        self.server = _Server(("127.0.0.1", 0), _Connection)
        self.server.relay = self
        self.port: int = self.server.server_address[1]

    def __enter__(self) -> Relay:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self.server.shutdown()
        self.server.server_close()

    def cut(self) -> None:
        """Breaks every connection, and any that is made until `mend`."""
        self.is_cut = True
        for end in list(self.open):
            _close(end)

    def mend(self) -> None:
        """Carries new connections again, at full rate."""
        self.is_cut, self.rate = False, math.inf

    def carry(self, client: socket.socket) -> None:
        """Carries what client and server say until one of them, or `cut`, ends it."""
        if self.is_cut:
            return
        with socket.create_connection(("127.0.0.1", self.to)) as server:
            self.open |= {client, server}
            back = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
            back.start()
            self._pump(client, server, True)
            back.join()
            self.open -= {client, server}

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with suppress(OSError):
            while block := source.recv(BLOCK):
                if upwards:
                    time.sleep(len(block) / self.rate)
                    self.up += len(block)
                sink.sendall(block)
        _close(source)
        _close(sink)


class _Server(ThreadingTCPServer):
    daemon_threads = True
    relay: Relay


class _Connection(BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.relay.carry(self.request)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
