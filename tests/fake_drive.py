"""A web server on 127.0.0.1 that behaves like Google Drive and like worse hosts."""

from __future__ import annotations

import http.server
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

QUOTA_PAGE = b"""<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head>
<body>Too many users have viewed or downloaded this file recently.</body></html>"""
FORM_PAGE = """<!DOCTYPE html><html><head><title>Virus scan warning</title></head><body>
<form id="download-form" action="{action}" method="get"><input type="submit" value="Go"/>
<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1&amp;2"></form></body></html>"""
CONFIRMED = {"id": ["ID"], "confirm": ["t"], "uuid": ["1&2"]}


@dataclass(frozen=True)
class Reply:
    """How the host answers one request for the file. By default it behaves well."""

    status: int | None = None  # in place of the right one; 0 hangs up without a word
    headers: dict[str, str | None] = field(default_factory=dict)  # changed; None leaves one out
    body: bytes | None = None  # in place of the file's bytes
    ranges: bool = True  # False: sends the whole file with status 200
    cut: int | None = None  # hangs up after so many bytes of the body
    block: int = 1 << 16  # the body is sent in pieces of this size
    pause: float = 0  # seconds before each piece
    chunked: bool = False  # each piece is a chunk, and no length is announced


class FakeDrive:
    """The server, as a context manager.

    Each request for the file takes the next of `replies`; the last one stays. `front` is what
    comes first: "form" is Drive's page, "" is nothing. `.ranges` has the Range of each request.
    """

    def __init__(self, content: bytes, replies: list[Reply] = (), front: str = "form") -> None:
        self.content, self.replies, self.front = content, list(replies) or [Reply()], front
        self.ranges, self.sent = [], 0
        drive = self

        class Handler(http.server.BaseHTTPRequestHandler):
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
        is_file = url.path == "/download" and parse_qs(url.query) == CONFIRMED
        if self.front and not is_file:
            page = FORM_PAGE.format(action=f"{self.host}/download").encode()
            return self.send(request, 200, {}, page, Reply(block=40, chunked=True))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        asked, length = request.headers.get("Range"), len(self.content)
        self.ranges.append(asked)
        if reply.status == 0:
            return None
        status, start, headers = 200, 0, {}
        if asked and reply.ranges:
            status, start = 206, int(asked[len("bytes=") : -1])
            headers = {"Content-Range": f"bytes {start}-{length - 1}/{length}"}
            if start >= length:
                status, headers = 416, {"Content-Range": f"bytes */{length}"}
        body = self.content[start:] if reply.body is None else reply.body
        return self.send(request, reply.status or status, headers, body, reply)

    def send(self, request, status: int, headers: dict, body: bytes, reply: Reply) -> None:
        request.protocol_version = "HTTP/1.1"
        request.send_response(status)
        if reply.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = len(body)
        for name, value in {**headers, "Connection": "close", **reply.headers}.items():
            for line in value if isinstance(value, list) else [value]:
                if line is not None:
                    request.send_header(name, str(line))
        request.end_headers()
        for at in range(0, len(body[: reply.cut]), reply.block):
            piece = body[at : min(at + reply.block, reply.cut or len(body))]
            time.sleep(reply.pause)
            request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if reply.chunked else piece)
            self.sent += len(piece)
        if reply.chunked and reply.cut is None:
            request.wfile.write(b"0\r\n\r\n")
