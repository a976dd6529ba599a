"""Request guard of the local web page: Host and Origin checks, bounds on uploads (an ASGI middleware)."""

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAX_REQUEST_BYTES = 12_000_000
"""Largest request body: an upload at its limit of 10 MB, and the form around it."""

MAX_CONCURRENT_UPLOADS = 4

MAX_KEPT_BYTES = 100_000_000
"""Size of the upload directory above which the oldest files are deleted before the next upload."""

# ASGI's own types, which are open mappings by design.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def refusal(headers: Mapping[str, str], own_host: str) -> str | None:
    """Return why a request does not come from this page, or None if it may.

    A website can point its own domain name at 127.0.0.1 (DNS rebinding) or post forms across origins. The Host header
    then holds that name, or Origin differs from Host. IP addresses cannot be rebound and are accepted.

    Args:
        headers: request headers by lower-case name.
        own_host: host that the page is served at.
    """
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        origin = urlsplit(headers["origin"]).netloc if "origin" in headers else host
    except ValueError:  # brackets that do not match
        return "malformed Host or Origin"
    if name not in ("localhost", own_host.lower()) and not _is_address(name):
        return "the Host header names another machine"
    if origin.lower() != host.lower():
        return "the Origin header names another page"
    return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def prune(directory: Path, max_bytes: int = MAX_KEPT_BYTES) -> None:
    """Delete the oldest files in and below a directory until the rest has at most ``max_bytes``."""
    files = []
    for path in directory.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # deleted meanwhile
            continue
        if not path.is_dir():
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


class RequestGuard:
    """ASGI middleware that passes on only this page's own requests, and bounds the uploads that are kept.

    Args:
        app: the application behind it.
        host: host that the page is served at.
        uploads: directory that uploads are written to.
    """

    def __init__(self, app: App, host: str, uploads: Path):
        self.app, self.host, self.uploads = app, host, uploads
        self._running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # the page uses none
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if reason := refusal(headers, self.host):
            await _answer(send, 403, reason)
        elif scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
        elif not headers.get("content-length", "0").isdecimal():
            await _answer(send, 400, "malformed Content-Length")
        elif int(headers.get("content-length", "0")) > MAX_REQUEST_BYTES:
            await _answer(send, 413, f"the size is above {MAX_REQUEST_BYTES:,} bytes")
        elif scope["path"].rstrip("/").endswith("upload"):
            await self._upload(scope, receive, send)
        else:
            await self.app(scope, _limited(receive), send)

    async def _upload(self, scope: Message, receive: Receive, send: Send) -> None:
        if self._running >= MAX_CONCURRENT_UPLOADS:
            await _answer(send, 429, "too many uploads at once")
            return
        self._running += 1
        try:
            prune(self.uploads)
            await self.app(scope, _limited(receive), send)
        finally:
            self._running -= 1


def _limited(receive: Receive) -> Receive:
    """Return ``receive`` that hangs up on a body above the limit, for requests without a Content-Length."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return message if received <= MAX_REQUEST_BYTES else {"type": "http.disconnect"}

    return limited


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
