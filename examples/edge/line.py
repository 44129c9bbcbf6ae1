"""The line between the branch and the head office: a TCP forwarder that a web page cuts."""

import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Line:
    """Forwards connections from ``port`` to ``target`` on ``host``, until it is cut."""

    def __init__(self, host: str, port: int, target: int) -> None:
        self._host, self._target = host, target
        self._cut = False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, and refuse new ones."""
        self._cut = True
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Forward again."""
        self._cut = False

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            try:
                if self._cut:
                    raise OSError
                server = socket.create_connection((self._host, self._target))
            except OSError:
                client.close()
                continue
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        self._open.add(source)
        with suppress(OSError):
            while not self._cut and (data := source.recv(65536)):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()


def serve_switch(line: Line, host: str, port: int, back: str) -> None:
    """Serve POST /cut and POST /mend in a thread; they lead back to the page ``back``."""

    class Switch(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path == "/cut":
                line.cut()
            elif self.path == "/mend":
                line.mend()
            self.send_response(303)
            self.send_header("Location", back)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer((host, port), Switch)
    threading.Thread(target=server.serve_forever, daemon=True).start()
