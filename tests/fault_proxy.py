"""An HTTP proxy in front of a real store, which loses, cuts, delays and refuses what it is told to.

with FaultProxy("http://127.0.0.1:9000", at_random(seed=0, refuse=0.05, reset=0.02)) as proxy:
    ...  # a client of proxy.url
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal["refuse", "reset", "truncate", "drip", "hang", "lose"]
"""503 or a reset without asking the store; half of the answer's body; 128 B/s; no answer; a reset after it acted."""

_DRIP = 32
"""Bytes each quarter of a second."""
_OWN_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass(frozen=True)
class Request:
    """What a plan decides on: the how-many-th request, its method and its path without the query."""

    number: int
    method: str
    path: str


Plan = Callable[[Request], Fault | None]


def at_random(seed: int, **rates: float) -> Plan:
    """Each fault at its rate, drawn from the request's number, so that the order of arrival does not matter."""

    def plan(request: Request) -> Fault | None:
        drawn = random.Random(f"{seed} {request.number}").random()
        for fault, rate in rates.items():
            if drawn < rate:
                return fault  # type: ignore[return-value]
            drawn -= rate
        return None

    return plan


def always(fault: Fault, method: str, ending: str = "", times: int | None = None) -> Plan:
    """The fault for requests of a method and of objects whose path ends so, the first `times` of them."""
    met = 0

    def plan(request: Request) -> Fault | None:
        nonlocal met
        if request.method != method or not request.path.endswith(ending):
            return None
        met += 1
        return fault if times is None or met <= times else None

    return plan


class FaultProxy:
    """The proxy, on a free port of this machine until the end of the `with`."""

    def __init__(self, store: str, plan: Plan) -> None:
        self.plan = plan
        self.faults: list[tuple[Fault, str]] = []
        """What was done so far, with its method and path."""
        self.requests = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        address = urlsplit(store)
        handler = type("Handler", (_Handler,), {"proxy": self, "store": (address.hostname, address.port)})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def decide(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests += 1
            fault = self.plan(Request(self.requests, method, path))
            if fault:
                self.faults.append((fault, f"{method} {path}"))
            return fault

    def wait(self, seconds: float) -> bool:
        """Wait; whether the proxy is over meanwhile."""
        return self._over.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what a proxy of faults expects."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    store: tuple[str, int]

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.decide(self.command, urlsplit(self.path).path)
        if fault == "refuse":
            return self._reply(503, {"Retry-After": "0"}, b"<Error><Code>SlowDown</Code></Error>")
        if fault == "reset":
            return self._reset()
        if fault == "hang":
            self.proxy.wait(600)
            return self._reset()
        status, headers, answer, length = self._ask(body)
        if fault == "lose":
            return self._reset()
        return self._reply(status, headers, answer, length, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815 - names of http.server

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes, int]:
        connection = http.client.HTTPConnection(*self.store, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            length = int(answer.getheader("Content-Length") or len(data))
            return answer.status, dict(answer.getheaders()), data, length
        finally:
            connection.close()

    def _reply(
        self, status: int, headers: dict[str, str], body: bytes, length: int | None = None, fault: Fault | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _OWN_HEADERS:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if fault == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "drip":
            self._drip(body)
        else:
            self.wfile.write(body)

    def _drip(self, body: bytes) -> None:
        for start in range(0, len(body), _DRIP):
            self.wfile.write(body[start : start + _DRIP])
            if self.proxy.wait(0.25):
                return

    def _reset(self) -> None:
        """Close the connection with a RST instead of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""
