"""An HTTP server on the loopback that logs its requests and can be told to fail: what tests/support/hub_server.py is built on."""

import json
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # bound here, so that tests may shorten the client's waits in the module `time`
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Request(NamedTuple):
    """One request as it came (path with query); status 0: closed without an answer, before it was handled."""

    method: str
    path: str
    status: int
    token: str | None


@dataclass
class Fault:
    """Something to go wrong with matching requests: see `Loopback.fault`. `hits` counts the requests it befell."""

    method: str | None = None
    path: str = ""
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected fault"
    drop: bool = False
    drop_after: bool = False
    cut: int | None = None
    flip: int | None = None
    slow: float = 0
    drip: tuple[int, float] | None = None
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or not re.search(self.path, path) or self.hits == self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True


@dataclass
class Call:
    """A request on its way to the route that answers it; `args` are the named parts of its path, unquoted."""

    method: str
    args: dict[str, str]
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    token: str | None
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Reply:
    status: int
    body: bytes
    headers: dict[str, str]


def to_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json", **(headers or {})})


def to_bytes(call: Call, data: bytes, headers: dict[str, str]) -> Reply:
    """All of the data, or the range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not asked or asked.groups() == ("", ""):
        return Reply(200, data, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


class Refusal(Exception):
    """An error answer, in the form that huggingface_hub's hf_raise_for_status reads."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **body: Any):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.reply = to_json({"error": message, **body}, status, headers)


Route = Callable[[Any, Call], Any]
ROUTES: list[tuple[list[str], re.Pattern[str], Route]] = []


def route(methods: str, path: str) -> Callable[[Route], Route]:
    """Let the decorated method of a Loopback answer such requests ("GET|HEAD"). It returns a Reply, or what to send as JSON."""

    def register(handler: Route) -> Route:
        ROUTES.append((methods.split("|"), re.compile(path), handler))
        return handler

    return register


class Loopback:
    """The server (it runs in a thread of its own from the start), the log of its requests, and what is to go wrong."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def reset(self) -> None:
        """Forget all requests and faults; the address stays."""
        with self._lock:
            self.crashes: list[str] = []  # tracebacks of the server's own errors, each answered with status 500
            self._requests: list[Request] = []
            self._faults: list[Fault] = []

    @property
    def requests(self) -> list[Request]:
        """All requests since the reset, in order."""
        with self._lock:
            return list(self._requests)

    def forget_requests(self) -> None:
        """Count requests from here."""
        with self._lock:
            self._requests.clear()

    def forget_faults(self) -> None:
        """All goes well from here."""
        with self._lock:
            self._faults.clear()

    def seen(self, method: str, path: str = "") -> list[Request]:
        """The requests of this method whose path has a match of the pattern."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def fault(self, method: str | None = None, path: str = "", *, times: int | None = 1, skip: int = 0, **kind: Any) -> Fault:
        """Let something go wrong with the next `times` (None: all) requests that match, after `skip` of them went well.

        `path` is a pattern searched in the path as sent, quoted and with its query. Kinds, which may be combined:
        `status=429, headers={"Retry-After": "1"}, message="..."` answers this error instead of handling the request;
        `drop=True` closes the connection instead of handling it; `drop_after=True` handles it, then closes without an answer;
        `cut=n` promises the whole body, sends n bytes of it and closes; `flip=n` flips a bit of the body's byte n;
        `slow=seconds` handles it, then waits before the answer; `drip=(n, seconds)` waits after every n bytes of the body.
        """
        fault = Fault(method, path, times, skip, **kind)
        with self._lock:
            self._faults.append(fault)
        return fault

    def admit(self, call: Call) -> None:
        """Refuse a call that no route shall see."""

    def take_fault(self, method: str, path: str) -> Fault:
        """The first fault that strikes this request; one that does nothing if there is none."""
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(method, path)), Fault())

    def record(self, method: str, path: str, status: int, token: str | None) -> None:
        with self._lock:
            self._requests.append(Request(method, path, status, token))

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes, token: str | None) -> Reply:
        """Let the route of this request answer it."""
        url = urlsplit(target)
        try:
            with self._lock:
                for methods, pattern, handler in ROUTES:
                    match = pattern.fullmatch(url.path)
                    if match and method in methods:
                        args = {name: unquote(value or "") for name, value in match.groupdict().items()}
                        call = Call(method, args, parse_qs(url.query), headers, token, body)
                        self.admit(call)
                        result = handler(self, call)
                        return result if isinstance(result, Reply) else to_json(result)
            raise Refusal(404, f"No such page: {method} {url.path}")
        except Refusal as refusal:
            return refusal.reply
        except Exception:
            self.crashes.append(f"{method} {target}\n{traceback.format_exc()}")
            return to_json({"error": traceback.format_exc()}, 500)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    owner: Loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that goes away is no error
            self.owner.crashes.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        owner, body = self.server.owner, self._read_body()
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        sender = token if scheme.lower() == "bearer" else None
        fault = owner.take_fault(self.command, self.path)
        if fault.drop:
            owner.record(self.command, self.path, 0, sender)
            self.close_connection = True
            return
        if fault.status is not None:
            reply = Refusal(fault.status, fault.message, headers=fault.headers).reply
        else:
            reply = owner.answer(self.command, self.path, self.headers, body, sender)
        owner.record(self.command, self.path, reply.status, sender)
        sleep(fault.slow)
        if fault.drop_after:
            self.close_connection = True
        else:
            self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, reply: Reply, fault: Fault) -> None:
        body = bytearray(reply.body)
        if fault.flip is not None:
            body[fault.flip] ^= 1
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.cut is not None:
            del body[fault.cut :]
            self.close_connection = True
        step, pause = fault.drip or (max(1, len(body)), 0)
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            sleep(pause)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `Loopback.requests` is the log."""
