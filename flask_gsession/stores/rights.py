"""File rights: only their owner may read the files that hold sessions."""

from __future__ import annotations

import os
import stat

from ..events import logger

# Windows has neither these flags nor user ids; the folder's rights apply.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_HAS_USERS = hasattr(os, "geteuid")
OTHERS = 0o077 if _HAS_USERS else 0  # the rights of everybody but the owner


def secure(path: str | os.PathLike[str]) -> str:
    """Revoke the rights of other users to a file or folder. Returns "", or why that is impossible.

    Root may change files of any user, and root's files count as ours. The file itself isn't opened:
    closing it would drop the locks that SQLite holds on it in this process. On Windows, only checks
    for links. Raises ``OSError``.
    """
    there = os.stat(path, follow_symlinks=False)
    if stat.S_ISLNK(there.st_mode):
        return "is a symbolic link"
    if not _HAS_USERS:
        return ""
    user = os.geteuid()
    if _is_foreign(there):
        return (
            f"belongs to another user (uid {there.st_uid}; this process runs as uid {user}), who "
            "could read and alter sessions: remove it, or give it to the user of the application"
        )
    mode = stat.S_IMODE(there.st_mode)
    if not mode & OTHERS:
        return ""
    if user not in (0, there.st_uid):
        return (
            f"is open to others (mode {mode:o}) and belongs to root: give it to the user of the "
            "application, or remove the permissions with chmod go-rwx"
        )
    os.chmod(path, mode & ~OTHERS)
    if stat.S_IMODE(os.stat(path).st_mode) & OTHERS:
        logger.warning(
            "%s is open to others (mode %o), and its file system keeps no permissions", path, mode
        )
    else:
        logger.warning(
            "%s was open to others (mode %o) and holds sessions: its permissions are now %o",
            path,
            mode,
            mode & ~OTHERS,
        )
    return ""


def is_foreign_link(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a symbolic link that another user made, and could lead elsewhere."""
    there = os.stat(path, follow_symlinks=False)
    return stat.S_ISLNK(there.st_mode) and _is_foreign(there)


def others_may_replace(folder: str | os.PathLike[str], rights: int = 0o022) -> bool:
    """Whether others could use these rights to replace a file in ``folder``."""
    mode = os.stat(folder).st_mode
    return _HAS_USERS and bool(mode & rights) and not mode & stat.S_ISVTX


def _is_foreign(there: os.stat_result) -> bool:
    if not _HAS_USERS:
        return False
    user = os.geteuid()
    return user != 0 and there.st_uid not in (0, user)
