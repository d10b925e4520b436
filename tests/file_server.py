"""A server of a folder's files over HTTP, with ranges and without listings, which can fail as real servers do.

with FileServer(tmp_path) as server:
    load(f"{server.url}/arm", streaming=True)
"""

import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self


class FileServer:
    """Serve the files under `root`.

    lists: Whether a folder is answered with links to its files.
    ranges: Whether a part of a file can be requested.
    failures: End of a path -> number of further requests (GET) for such files that get the answer 503.
    cuts: As `failures`, but the connection breaks in the middle of the answer.
    requests, sent: Number of requests and bytes by the name of a file.
    """

    def __init__(self, root: Path):
        self.root = root
        self.lists, self.ranges = True, True
        self.failures: dict[str, int] = {}
        self.cuts: dict[str, int] = {}
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    files: FileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would hold back the content until the header is acknowledged

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, with_content: bool) -> None:
        path = self.files.root / self.path.lstrip("/")
        self.files.requests[path.name] += with_content
        if with_content and self._is_due(self.files.failures):
            return self._send(503, b"")
        if path.is_dir() and self.files.lists:
            links = (f'<a href="{each.name}{"/" * each.is_dir()}">{each.name}</a>' for each in path.iterdir())
            return self._send(200, "".join(links).encode(), with_content)
        if not path.is_file():
            return self._send(404, b"")
        content, size = path.read_bytes(), path.stat().st_size
        headers = {"ETag": str(path.stat().st_mtime_ns), "Accept-Ranges": "bytes" if self.files.ranges else "none"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or not self.files.ranges:
            return self._send(200, content, with_content, headers)
        start, end = int(span[1]), min(int(span[2] or size - 1), size - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self._send(206, content[start : end + 1], with_content, headers)

    def _is_due(self, faults: dict[str, int]) -> bool:
        for ending, count in faults.items():
            if count and self.path.endswith(ending):
                faults[ending] -= 1
                return True
        return False

    def _send(self, status: int, content: bytes, with_content: bool = True, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content and content and self._is_due(self.files.cuts):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif with_content:
            self.wfile.write(content)
            self.files.sent[Path(self.path).name] += len(content)
