"""A web server on 127.0.0.1 that behaves like Google Drive and like the worse hosts, for the tests of the downloader.

`FakeDrive(content, replies)` serves `content` (bytes, or a `Pattern` of any length) under `.url`. Each request for the
file itself takes the next of `replies`, and the last one stays; `front` says what is met before the file.
"""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

QUOTA_PAGE = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title><style>p{}</style></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p>Too many users have viewed or downloaded this file recently.</p></body></html>"""
FORM_PAGE = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="{action}" method="get"><input type="submit" id="uc-download-link" value="Go"/>
<input type="hidden" name="id" value="ID"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="1&amp;2"></form></body></html>"""
COOKIE_PAGE = "<html><head><title>Google Drive - Virus scan warning</title></head><body>too big to scan</body></html>"
BLOCK = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """`length` bytes that are made when they are asked for, so that no side needs memory for them."""

    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, span: slice) -> bytes:
        block = b"PK" + bytes(range(256)) * (BLOCK // 256)
        first = span.start % BLOCK
        return (block[first:BLOCK] + block[:BLOCK])[: min(span.stop, self.length) - span.start]

    def md5(self) -> str:
        digest = hashlib.md5()
        for start in range(0, self.length, BLOCK):
            digest.update(self[start : start + BLOCK])
        return digest.hexdigest()


@dataclass(frozen=True)
class Reply:
    """How one request for the file goes; the default is well-behaved, with ranges."""

    cut: int | None = None  # close the connection after so many bytes of the body
    ranges: bool = True  # False: send all of it with 200 whatever is asked
    shift: int = 0  # added to the place at which the answer begins, and says that it begins
    status: int = 200  # anything else is sent with a small page and nothing of the file
    page: str | None = None  # this web page in place of the file
    page_type: str = "text/html; charset=utf-8"
    flip: bool = False  # one byte of the body is wrong
    block_s: float = 0  # pause before each 64 kB
    no_length: bool = False  # no Content-Length: the end of the connection is the end of the file
    bare_416: bool = False  # no Content-Range with a 416


class FakeDrive:
    """The server, as a context manager; `.asked` lists (path, fields, Range) of each request."""

    def __init__(self, content: bytes | Pattern, replies: tuple[Reply, ...] = (Reply(),), front: str = "form") -> None:
        self.content, self.replies, self.front, self.asked = content, list(replies), front, []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hangs up is no news; it would go to our stderr
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.host}/uc?export=download&id=ID"

    def __enter__(self) -> FakeDrive:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def ranges(self) -> list[str | None]:
        """Return the Range header of each request that reached the file."""
        return [asked for path, _, asked in self.asked if path == "/file"]

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        drive = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                fields = {key: values[0] for key, values in parse_qs(url.query).items()}
                is_file = (
                    drive.front == "none"
                    or (drive.front == "form" and url.path == "/download" and self.confirmed(fields))
                    or (drive.front == "cookie" and fields.get("confirm") == "TOKEN")
                )
                drive.asked.append(("/file" if is_file else url.path, fields, self.headers.get("Range")))
                try:
                    if is_file:
                        self.send_file(drive.replies.pop(0) if len(drive.replies) > 1 else drive.replies[0])
                    elif drive.front == "form":
                        self.send_page(FORM_PAGE.format(action=f"{drive.host}/download"))
                    else:
                        self.send_page(COOKIE_PAGE, headers={"Set-Cookie": "download_warning_13_ID=TOKEN; Path=/"})
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def confirmed(self, fields: dict[str, str]) -> bool:
                return fields == {"id": "ID", "export": "download", "confirm": "t", "uuid": "1&2"}

            def send_page(
                self, text: str, status: int = 200, kind: str = "text/html", headers: dict | None = None
            ) -> None:
                """Send a page in many small chunks, as the real host does."""
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Type": kind, "Transfer-Encoding": "chunked"}.items():
                    self.send_header(name, value)
                self.end_headers()
                body = text.encode()
                for start in range(0, len(body), 40):
                    piece = body[start : start + 40]
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")

            def send_file(self, reply: Reply) -> None:
                length, asked = len(drive.content), self.headers.get("Range")
                if reply.page is not None:
                    return self.send_page(reply.page, kind=reply.page_type)
                if reply.status != 200:
                    return self.send_page("<html><title>Error</title></html>", reply.status)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and reply.ranges else 0
                if asked and reply.ranges and start >= length:
                    self.send_response(416)
                    if not reply.bare_416:
                        self.send_header("Content-Range", f"bytes */{length}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                partial = bool(asked and reply.ranges)
                self.send_response(206 if partial else 200)
                if partial:
                    start += reply.shift
                    self.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
                self.send_header("Content-Type", "application/octet-stream")
                if reply.no_length:
                    self.send_header("Connection", "close")
                else:
                    self.send_header("Content-Length", str(length - start))
                self.end_headers()
                self.close_connection = reply.no_length or reply.cut is not None
                stop = length if reply.cut is None else min(length, start + reply.cut)
                for at in range(start, stop, BLOCK):
                    block = drive.content[at : min(at + BLOCK, stop)]
                    if reply.flip and at == start:
                        block = block[:100] + bytes([block[100] ^ 1]) + block[101:]
                    time.sleep(reply.block_s)
                    self.wfile.write(block)
                return None

        return Handler
