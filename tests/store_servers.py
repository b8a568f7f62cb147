"""Servers for the tests of shared stores: an S3 (moto's), a plain web server, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from store_cases import World

from fpo.store import Spec, summed_logps

BUCKET = "caches"

_MOTO = f"""
import sys
from moto.server import ThreadedMotoServer
import boto3
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
_, port = server.get_host_and_port()
login = dict(aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{{port}}", **login).create_bucket(Bucket="{BUCKET}")
print(port, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of an S3 with one bucket, in its own process."""
    script = [sys.executable, "-W", "ignore", "-c", _MOTO]
    with subprocess.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield port
        finally:
            process.kill()


def s3_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Many connections at once: with the default of 5 some would wait a second for their next try.
    request_queue_size = 64


class WebServer:
    """Serves a folder on 127.0.0.1, and misbehaves on request."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.fault: Callable[[str, int, bytes], tuple[int, bytes, int]] | None = None
        """(name, how often it was asked for, body) -> status, body to send, Content-Length to announce."""
        self.dripping = ""
        """Names that end so are sent a byte at a time, for ever; "" for none."""
        self.mute = False
        """Requests are taken and never answered."""
        self._closed = threading.Event()
        handler = partial(_Handler, self, directory=str(folder))
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def pause(self, seconds: float | None = None) -> bool:
        """True until the server closes."""
        return not self._closed.wait(seconds)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, web: WebServer, *args: Any, **kwargs: Any) -> None:
        self.web = web
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        name = "/".join(self.path.split("/")[2:])
        self.web.requests["GET", name] += 1
        if self.web.mute:
            self.web.pause()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        status, sent, announced = 200, body, len(body)
        if self.web.fault is not None:
            status, sent, announced = self.web.fault(name, self.web.requests["GET", name], body)
        self.send_response(status)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.web.dripping and name.endswith(self.web.dripping):
                for position in range(len(sent)):
                    if self.web.pause(0.02):
                        self.wfile.write(sent[position : position + 1])
                return
            self.wfile.write(sent)

    def do_HEAD(self) -> None:
        self.web.requests["HEAD", "/".join(self.path.split("/")[2:])] += 1
        super().do_HEAD()

    def log_message(self, *args: Any) -> None:
        """Silence."""


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    server = WebServer(folder)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def dropping_proxy(port: int, budgets: list[int]) -> Iterator[int]:
    """
    A port that leads to `port`; connection n is cut after budgets[n] bytes of answers, those beyond the list never.
    """
    left = list(budgets)
    ends: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, budget: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**14):
                if budget is not None:
                    data, budget = data[:budget], budget - len(data)
                sink.sendall(data)
                if budget is not None and budget <= 0:
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                ends.extend([client, server])
                budget = left.pop(0) if left else None
                for arguments in ((client, server, None), (server, client, budget)):
                    threads.append(threading.Thread(target=pump, args=arguments, daemon=True))
                    threads[-1].start()

    threads = [threading.Thread(target=accept, daemon=True)]
    threads[0].start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        for end in (listener, *ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for end in (listener, *ends):
            end.close()


class OtherWorld(World):
    """The same groups and recipe as World, so the same key, scored with other bits: another manifest."""

    def __init__(self, root: Path, specs: Sequence[Spec] = ()) -> None:
        super().__init__(root, specs)
        logps = self.groups.token_logps * np.float32(0.5)
        sums = summed_logps(logps, self.groups.scored_splits)
        self.groups = dataclasses.replace(self.groups, token_logps=logps, ref_logps=sums)


def sealed(kind: type[World], root: Path, specs: Sequence[Spec] = ()) -> World:
    """A complete cache with these columns."""
    world = kind(root, specs)
    world.fill()
    return world


FAULTS = {
    "drops the connection": lambda body: (200, body[: len(body) // 2], len(body)),
    "sends nothing": lambda body: (200, b"", len(body)),
    "truncates": lambda body: (200, body[:-1], len(body) - 1),
    "flips a bit": lambda body: (200, bytes([body[0] ^ 1]) + body[1:], len(body)),
    "appends": lambda body: (200, body + b"x", len(body) + 1),
    "is overloaded": lambda body: (503, b"", 0),
}
"""What a web server may do: the true body -> status, what is sent, and the Content-Length that is announced."""
