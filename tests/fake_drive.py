"""A web server on 127.0.0.1 that behaves like Google Drive and like worse hosts."""

from __future__ import annotations

import http.server
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

QUOTA_PAGE = b"""<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head>
<body>Too many users have viewed or downloaded this file recently.</body></html>"""
FORM_PAGE = b"""<!DOCTYPE html><html><head><title>Virus scan warning</title></head><body>
<form id="download-form" action="/download" method="get"><input type="submit" value="Go"/>
<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1&amp;2"></form></body></html>"""
CONFIRMED = {"id": ["ID"], "confirm": ["t"], "uuid": ["1&2"]}


@dataclass(frozen=True)
class Reply:
    """How the host answers one request for the file. By default it behaves well."""

    status: int | None = None  # in place of the right one
    headers: dict[str, str | None] = field(default_factory=dict)  # changed; None leaves one out
    body: bytes | None = None  # in place of the file's bytes
    ranges: bool = True  # False: sends the whole file with status 200
    cut: int | None = None  # hangs up after so many bytes of the body
    block: int = 1 << 16  # the body is sent in pieces of this size
    pause: float = 0  # seconds before each piece
    chunked: bool = False  # each piece is a chunk, and no length is announced


class FakeDrive:
    """The server, as a context manager.

    `.url` leads to Drive's page and its form; every other address is the file. Each request for the
    file takes the next of `replies`; the last one stays. `.ranges` has the Range of each.
    """

    def __init__(self, content: bytes, replies: list[Reply] = ()) -> None:
        self.content, self.replies, self.ranges = content, list(replies) or [Reply()], []
        drive = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                drive.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        # A client that hangs up is no news.
        self.server.handle_error = lambda *_: None
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.host}/uc?id=ID"

    def __enter__(self) -> FakeDrive:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        if url.path == "/uc" or (url.path == "/download" and parse_qs(url.query) != CONFIRMED):
            self.send(request, 200, {}, FORM_PAGE, Reply(block=40, chunked=True))
            return
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        asked, length = request.headers["Range"], len(self.content)
        self.ranges.append(asked)
        status, start, headers = 200, 0, {}
        if asked and reply.ranges and not reply.status:
            status, start = 206, int(asked[len("bytes=") : -1])
            headers = {"Content-Range": f"bytes {start}-{length - 1}/{length}"}
        body = self.content[start:] if reply.body is None else reply.body
        self.send(request, reply.status or status, headers, body, reply)

    def send(self, request, status: int, headers: dict, body: bytes, reply: Reply) -> None:
        request.send_response(status)
        if reply.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = len(body)
        headers["Content-Type"] = "text/html" if body[:1] == b"<" else "application/octet-stream"
        for name, value in {**headers, "Connection": "close", **reply.headers}.items():
            if value is not None:
                request.send_header(name, str(value))
        request.end_headers()
        body = body[: reply.cut]
        for at in range(0, len(body), reply.block):
            piece = body[at : at + reply.block]
            time.sleep(reply.pause)
            request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if reply.chunked else piece)
        if reply.chunked and reply.cut is None:
            request.wfile.write(b"0\r\n\r\n")
