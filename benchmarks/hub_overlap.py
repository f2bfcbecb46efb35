"""How well download and encoding overlap, and how much disk a streamed build takes, against a throttled loopback hub.

Run `python benchmarks/hub_overlap.py`: it makes a random checkpoint of 1.2G weights in 48 shards, builds it from the
folder, then from a real HTTP server at several link speeds. Bar: wall ≤ 1.15 × max(download, encode), disk ≤ output +
2 shards + 64 MiB. The machine should be otherwise idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from mq_quant.quantize.tiny.tokenizer import tokenizer_json

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import hub_server  # noqa: E402
import small_model  # noqa: E402

SHARDS = 48
SHAPE = {"num_hidden_layers": 24, "num_local_experts": 256, "vocab_size": 1024}


def build(work: Path, source: str, output: str, settings: dict[str, str]) -> dict[str, Any]:
    """What `mq-quant build` reports; a fresh process, so that no cache of ours is warm but the compiler's."""
    command = [
        sys.executable,
        "-c",
        "from mq_quant.quantize.cli.app import main; main()",
        "build",
        "--tier",
        "mq2-lloyd",
    ]
    command += ["--source", source, "--no-imatrix", "--json", "--force", "--restart", "--output", output]
    command += sys.argv[1:]
    run = subprocess.run(command, cwd=work, env={**os.environ, **settings}, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


class DiskWatch:
    """The most bytes that the files under a folder took together, sampled until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.most, self._folder, self._stop = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            sizes = []
            for path in self._folder.rglob("*"):
                try:
                    sizes.append(path.lstat().st_blocks * 512)
                except OSError:  # deleted meanwhile
                    continue
            self.most = max(self.most, sum(sizes))

    def close(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.most


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, work = Path(name) / "model", Path(name) / "work"
        work.mkdir()
        small_model.CONFIG.update(SHAPE)
        small_model.save(folder, small_model.tensors(), SHARDS)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(SHAPE["vocab_size"])))
        files = hub_server.repository(folder)
        hub_server.information(
            hub_server.REPO, hub_server.MAIN, files
        )  # hashes, as a hub does before anybody asks
        total = sum(len(data) for data in files.values())
        largest = max(len(data) for data in files.values())
        build(work, str(folder), "local", {})  # compiles
        local = build(work, str(folder), "local", {})
        print(
            f"{total / 1e6:.0f} MB in {SHARDS} shards, encoded from the folder in {local['seconds']:.1f} s\n"
        )
        print(
            "| link MB/s | download s | encode s | wall s | wall / max | disk beyond output | shards fetched |"
        )
        print("|---|---|---|---|---|---|---|")
        with hub_server.serve({hub_server.REPO: {hub_server.MAIN: files}}) as hub:
            for factor in (0.5, 1.0, 2.0):
                report(work, hub, local, factor * local["seconds"], total, largest)


def report(
    work: Path, hub: hub_server.HubServer, local: dict[str, Any], download: float, total: int, largest: int
) -> None:
    hub.bytes_per_second, before = total / download, len(hub.requests)
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(work / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for old in ("local", "streamed"):
        (work / old).unlink(missing_ok=True)
    watch = DiskWatch(work)
    made = build(work, hub_server.REPO, "streamed", settings)
    disk = watch.close() - made["total_bytes"]
    assert made["quantization_hash"] == local["quantization_hash"]
    assert disk <= 2 * largest + (64 << 20), f"{disk} bytes of disk beyond the output"
    fetched = sum(r.path.startswith("/storage/") and r.range is None for r in hub.requests[before:])
    encode, wall = local["seconds"], made["seconds"]
    print(
        f"| {total / download / 1e6:.1f} | {download:.1f} | {encode:.1f} | {wall:.1f} "
        f"| {wall / max(download, encode):.2f} | {disk / largest:.2f} shards | {fetched} |"
    )


if __name__ == "__main__":
    main()
