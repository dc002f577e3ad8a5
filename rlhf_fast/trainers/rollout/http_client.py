"""JSON over HTTP to a server that is not trusted: tried again while that can help, a clear error when it cannot."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRIED_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))  # HTTP statuses that may pass
LARGEST = 1 << 30  # bytes of an answer
PIECE = 1 << 16  # bytes read at once
DRIP = 4  # an answer that comes byte by byte may take so many timeouts in all


class ServerError(RuntimeError):
    """The server cannot be used; says its address, the attempts made and the last reason."""


class BadAnswer(ValueError):
    """An answer that does not fit the request."""


@dataclass(frozen=True)
class ServerOptions:
    """How the server is reached.

    Args:
        url: "http://host:8000", with or without "/v1".
        model: the name it serves; None takes the first that it lists.
        timeout: seconds without a byte before an attempt is given up; the whole of an answer may take four times that.
        attempts: for each request, the first included.
        backoff: seconds before the second attempt, doubled for each further one up to 30, with jitter.
        concurrency: requests under way at once.
        api_key_env: environment variable that holds the key, if the server wants one.
        extra: more keys of the request's body.
    """

    url: str
    model: str | None = None
    timeout: float = 600.0
    attempts: int = 5
    backoff: float = 0.5
    concurrency: int = 32
    api_key_env: str = "RLHF_FAST_SERVER_API_KEY"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        for name in ("timeout", "attempts", "concurrency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the key and the prompts to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class JSONClient:
    """JSON over HTTP, tried again with exponential backoff."""

    def __init__(self, options: ServerOptions):
        self.options = options
        self.base = options.url.rstrip("/").removesuffix("/v1")
        self.stop = threading.Event()  # set: requests under way are not tried again
        self._jitter = random.Random()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def address(self, url: str) -> str:
        """A whole URL as it is, a path on the server."""
        return url if "://" in url else self.base + url

    def call(self, url: str, body: Any = None, *, check: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """`check(answer)` of a GET, or of a POST of `body`. A `BadAnswer` of `check` is tried again too.

        Raises: ServerError.
        """
        options, reason = self.options, ""
        url = self.address(url)
        for attempt in range(1, options.attempts + 1):
            try:
                return check(self._once(url, body))
            except (BadAnswer, OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if attempt < options.attempts:
                delay = min(options.backoff * 2 ** (attempt - 1), 30.0)
                if self.stop.wait(delay * self._jitter.uniform(0.5, 1.0)):
                    break
        raise ServerError(f"{url}: no usable answer in {attempt} attempts; the last: {reason}")

    def _once(self, url: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.options.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.options.timeout) as response:
                text = self._read(response)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
            if error.code in TRIED_AGAIN:
                raise BadAnswer(reason) from None
            raise ServerError(f"{url}: {reason}") from None
        try:
            return json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):  # nested too deeply
            raise BadAnswer(f"not JSON: {bytes(text[:80])!r}") from None

    def _read(self, response: http.client.HTTPResponse) -> bytearray:
        """The whole body, bounded in size and time."""
        text, limit = bytearray(), time.monotonic() + DRIP * self.options.timeout
        while piece := response.read1(PIECE):
            text += piece
            if len(text) > LARGEST:
                raise BadAnswer(f"longer than {LARGEST} bytes")
            if time.monotonic() > limit:
                raise BadAnswer(f"timed out: {len(text)} bytes in {DRIP * self.options.timeout:g} seconds, and no end")
        if response.length:  # of what Content-Length promised
            raise BadAnswer(f"cut off after {len(text)} bytes, {response.length} are missing")
        return text
