"""Which code this is.

A federation makes sense only if both sides run the same algorithm, and Flower can run other code than one thinks when
a folder shadows a package. So the server sends a fingerprint of its source, and a client compares it with its own.
"""

import hashlib
from functools import cache
from pathlib import Path

import adadpigu_core


@cache
def code_fingerprint() -> str:
    """Version and a hash of the source of the core, the client and the server."""
    root = Path(adadpigu_core.__file__).parent.parent
    digest = hashlib.sha256()
    for package in ("adadpigu_core", "client", "server"):
        # by name, because paths compare differently from system to system
        sources = {path.relative_to(root).as_posix(): path for path in (root / package).rglob("*.py")}
        for name, path in sorted(sources.items()):
            digest.update(f"{name}\0".encode())
            # an archive or a checkout may have changed the line ends
            digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return f"{adadpigu_core.__version__}+{digest.hexdigest()[:12]}"
