"""The engine's unix socket: its path exists only while the engine accepts, so one that refuses is stale."""

from __future__ import annotations

import os
import secrets
import socket
import stat
from pathlib import Path


class EngineListener:
    """Listens under another name in the same folder until `publish`."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where no socket can be made, such as for a path that is too long."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        # Longer than the path itself: what fits here fits there.
        self._hidden = path.with_name(f"{path.name}.{secrets.token_hex(3)}")
        try:
            self.socket.bind(str(self._hidden))
            os.chmod(self._hidden, stat.S_IRUSR | stat.S_IWUSR)
            self.socket.listen(16)
        except OSError as error:
            self.socket.close()
            raise ValueError(f"engine_socket {path}: {error.strerror or error}") from error

    def publish(self) -> None:
        """Let front ends find it.  Raises ValueError when another engine was first."""
        try:
            os.link(self._hidden, self._path)  # unlike a rename, it replaces nobody's socket
        except FileExistsError:
            raise ValueError(f"engine_socket {self._path}: another engine listens there already") from None
        self._hidden.unlink()

    def close(self) -> None:
        """The path stays: it refuses from now on, and whoever finds that removes it."""
        self.socket.close()
        self._hidden.unlink(missing_ok=True)
