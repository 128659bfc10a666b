"""A web server on 127.0.0.1 that behaves like Google Drive and like worse hosts."""

import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FORM_PAGE = b"""<html><title>Virus scan warning</title>
<form id="download-form" action="/download" method="get"><input type="submit" value="Go"/>
<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1&amp;2"></form></html>"""


@dataclass(frozen=True)
class Reply:
    """How the host answers one request for the file. By default it behaves well."""

    status: int = 0  # in place of the right one
    body: bytes | None = None  # in place of the file's bytes
    ranges: bool = True  # False: sends the whole file with status 200
    cut: int | None = None  # hangs up after so many bytes of the body
    sized: bool = True  # announces the length
    pause: float = 0  # seconds before each 4096 bytes


class FakeDrive(ThreadingHTTPServer):
    """The server, as a context manager.

    `.url` leads to Drive's page, whose form leads to the file, as does any other address. Each
    request for the file takes the next of `replies`; the last one stays. `.ranges` has their Range.
    """

    def __init__(self, content: bytes, *replies: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.replies, self.ranges = content, list(replies) or [Reply()], []
        self.host = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.host}/uc?id=ID"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        drive, asked = self.server, self.headers["Range"]
        confirmed = self.path == "/download?id=ID&confirm=t&uuid=1%262"
        if self.path.startswith(("/uc", "/download")) and not confirmed:
            self.send(Reply(200), FORM_PAGE)
            return
        drive.ranges.append(asked)
        reply = drive.replies.pop(0) if len(drive.replies) > 1 else drive.replies[0]
        start = int(asked[6:-1]) if asked and reply.ranges and not reply.status else None
        self.send(reply, drive.content[start:] if reply.body is None else reply.body, start)

    def send(self, reply: Reply, body: bytes, start: int | None = None) -> None:
        self.send_response(reply.status or (200 if start is None else 206))
        if start is not None:
            end = start + len(body)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        if reply.sized:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if body[:1] == b"<" else "application/zip")
        self.end_headers()
        for at in range(0, len(body[: reply.cut]), 4096):
            time.sleep(reply.pause)
            self.wfile.write(body[: reply.cut][at : at + 4096])

    def log_message(self, *_: object) -> None:
        """Nothing is written."""
