"""Files of the instance folder that several workers may want to make at the same moment."""

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def create_once(path: Path, fill: Callable[[Path], object]) -> None:
    """Make `path`, readable by its owner only, unless it is there already.

    The file is filled under another name and then linked into place, so it is complete from its
    first moment, and of several workers exactly one wins.

    :param fill: writes the content to the path it is given.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        fill(draft)
        with suppress(FileExistsError):  # another worker was first: its file is as good
            os.link(draft, path)
    finally:
        draft.unlink()


def secret_key(folder: Path) -> str:
    """The application's `SECRET_KEY`: `SHOP_SECRET_KEY`, or one made once and kept in `folder`."""
    given = os.environ.get("SHOP_SECRET_KEY")
    if given:
        return given
    path = folder / "secret_key"
    create_once(path, lambda draft: draft.write_text(secrets.token_urlsafe(32), encoding="ascii"))
    return path.read_text(encoding="ascii")
