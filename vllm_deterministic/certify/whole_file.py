"""Files that are written whole or not at all: processes that start together read and write the same ones."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str, mode: int = 0o600, *, replace: bool = True) -> None:
    """Put a file in the place of whatever is there, or of nothing.

    Args:
        path: in a folder that exists.
        text: the content.
        mode: of the file; as made, it is for its owner alone.
        replace: whether a file that is there may be replaced.

    Raises:
        FileExistsError: there is one, and it may not be replaced.
        OSError: the file cannot be written; nothing is left behind.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as temporary:
        written = Path(temporary.name)
        try:
            temporary.write(text)
            temporary.flush()
            written.chmod(mode)
            if replace:
                os.replace(written, path)
            else:
                os.link(written, path)  # which fails where there is one, however late it came
                written.unlink()
        except OSError:
            written.unlink(missing_ok=True)
            raise
