"""Gets the archives by the registries' own clients, holds them against their SHA-256, and unpacks them.

PyPI: unearth (`pip install unearth`), which downloads an sdist without building it. npm: `npm pack`. Debian:
`apt-get download`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

from textmaking.catalogue import Source


def _command(source: Source) -> list[str]:
    match source.channel:
        case "pypi":
            wanted = f"{source.package}=={source.version}"
            return [sys.executable, "-m", "unearth", "--no-binary", "--download", ".", wanted]
        case "npm":
            return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        case "debian":
            return ["apt-get", "download", "-q", f"{source.package}={source.version}"]
    raise ValueError(f"{source.name}: the channel {source.channel!r} is not pypi, npm or debian")


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/")[2]
            if member.isfile() and inside:
                tar.extract(member.replace(name=inside, deep=False), folder, filter="data")


def fetch(source: Source, cache: Path) -> Path:
    """The folder with the source's files; what `cache` holds already is not downloaded again.

    Raises ValueError where the archive's SHA-256 is not the catalogue's.
    """
    if source.channel == "own":
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / source.archive
    if not archive.exists():
        subprocess.run(_command(source), check=True, cwd=cache, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{archive}: the SHA-256 is {found}, not {source.sha256} as the catalogue says")
    folder = cache / f"{source.archive}.files"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        _unpack(archive, partial)
        partial.rename(folder)
    return folder
