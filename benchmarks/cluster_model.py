"""How long a cluster takes for M2.7, from 1 to 64 nodes and from 1 to 16 GPUs: a simulation of `build --ray`.

Run `python benchmarks/cluster_model.py`; `-o docs/pictures/cluster.svg` draws it. Slices are cut, and slow ones
overtaken, by the program's own functions; how fast a core or a GPU encodes is what plan counts with (measured,
docs/speed.md). A line or a shared disk is divided equally among those who read at a time. The nodes hash a folder's
shards before, over their lines; the driver reads back what was written, and hashes that, at the speed of its line or at
the 2.2 GB in a second of processor time that `PartialFile.note` took. Nodes differ in speed by a twentieth; one in 32
is slow by half.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mq_quant.quantize.pipeline.cluster.job import Slice
from mq_quant.quantize.pipeline.cluster.slices import cut, overtaken
from mq_quant.quantize.pipeline.work_units import WorkUnit, file_order
from mq_quant.quantize.spec.calibration_sizes import USUAL_TOKENS
from mq_quant.quantize.spec.efforts import CPU_CORE, GPU, gather_products, own_products
from mq_quant.quantize.spec.estimates import offline_plan, source_bytes
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.plan import Plan
from mq_quant.quantize.spec.recipe import load_tier
from mq_quant.verify.pictures import BLUE, GREEN, INK, ORANGE, new, svg

GIGABIT = 1e9 / 8
CORES = 16
SHARDS = 125
OPENS = 10.0
"""Seconds in which a worker starts and opens the build: the interpreter, headers of 125 shards, the imatrix."""
STARTS = 5.0
"""Seconds in which processes start that hash shards."""
SAMPLED = 4 * 4 * 2 * 64
"""Rows of gate and up that every slice encodes to choose its layer's AWQ exponent."""
SLOW = 0.5
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Site:
    """What a cluster has: workers of one node, weights that a worker encodes in a second, and bytes in a second of a
    node's line, of what all of them read the source from, and of the driver.

    A `hub` hands out whole shards of so many bytes; from a shared folder a slice reads what it needs.
    `layer_seconds` is what running the model through a layer takes.
    """

    nodes: int
    workers: int
    rate: float
    node_line: float = 10 * GIGABIT
    source_line: float = 5e9
    driver: float = min(2.2e9, 10 * GIGABIT)
    shard_bytes: float = 0.0
    layer_seconds: float = 0.0
    whole_layers: bool = False


@dataclass(frozen=True)
class Task:
    """A slice: seconds that it keeps a worker busy, bytes that it reads and that it writes."""

    piece: Slice
    seconds: float
    reads: float
    writes: float


def tasks_of(plan: Plan, order: Sequence[WorkUnit], site: Site) -> list[Task]:
    """The slices of a whole build at a site."""
    units = {unit.key: unit for unit in order}
    per_weight = source_bytes(plan.config) / sum(unit.weights for unit in order)
    at, out = 0.0, []
    for piece in cut(order, order, 0, site.nodes * site.workers, whole=site.whole_layers):
        mine = [units[key] for key, _ in piece.units]
        read = piece.weights * per_weight
        if site.shard_bytes:
            shards = math.ceil((at + read) / site.shard_bytes) - math.floor(at / site.shard_bytes)
            fetched = shards * site.shard_bytes
        else:
            fetched = read
        experts = mine[-1].expert is not None
        samples = SAMPLED * plan.config.hidden_size if experts else 0
        seconds = (piece.weights + samples) / site.rate + (site.layer_seconds if experts else 0.0)
        out.append(Task(piece, seconds, fetched, float(sum(unit.nbytes for unit in mine))))
        at += read
    return out


@dataclass
class Worker:
    """One worker: it opens the build, then fetches and encodes one slice after the other."""

    node: int
    speed: float
    opening: float = OPENS
    task: Task | None = None
    reads: float = 0.0
    seconds: float = 0.0
    spent: float = 0.0

    def begin(self, task: Task) -> None:
        self.task, self.reads, self.seconds, self.spent = task, task.reads, task.seconds, 0.0

    @property
    def is_fetching(self) -> bool:
        return self.task is not None and self.reads > 0

    def work(self, step: float, line: float) -> Task | None:
        """Go on for a step, with so many bytes of a line in a second; the task that ended."""
        if self.opening > 0:
            self.opening -= step * self.speed
        elif self.task is not None:
            self.spent += step
            if self.reads > 0:
                self.reads -= step * line
            else:
                self.seconds -= step * self.speed
                if self.seconds <= 0:
                    task, self.task = self.task, None
                    return task
        return None


def workers_of(site: Site) -> list[Worker]:
    """The workers of all nodes, whose speeds differ a little; one node in 32 is slow."""
    chance = random.Random(7)
    speeds = [SLOW if n % 32 == 31 else 1 / (1 + abs(chance.gauss(0, 0.05))) for n in range(site.nodes)]
    return [Worker(n, speeds[n]) for _ in range(site.workers) for n in range(site.nodes)]


@dataclass(frozen=True)
class Run:
    """A simulated build: seconds until the driver has noted everything, bytes that were read, slices done twice."""

    seconds: float
    read: float
    twice: int


def simulate(site: Site, tasks: Sequence[Task], workers: Sequence[Worker]) -> Run:
    """A build of these tasks, in steps that are small beside a slice."""
    todo = list(tasks)
    together = min(site.source_line, site.nodes * site.node_line)
    hashing = 0.0 if site.shard_bytes else STARTS + sum(task.reads for task in tasks) / together
    by_piece, running = {task.piece: task for task in tasks}, dict[Slice, int]()
    step = max(0.02, median(task.seconds for task in tasks) / 50)
    now = driver_free = read = 0.0
    taken, idle_since, twice = list[float](), math.inf, 0
    while todo or running:
        now += step
        fetching = [worker for worker in workers if worker.is_fetching]
        on_node = Counter(worker.node for worker in fetching)
        share = site.source_line / max(1, len(fetching))
        for worker in workers:
            line = min(share, site.node_line / max(1, on_node[worker.node]))
            done = worker.work(step, line)
            if done is not None and running.pop(done.piece, 0):
                taken.append(worker.spent)
                driver_free = max(driver_free, now) + done.writes / site.driver
                for other in workers:  # whoever has it too is stopped
                    other.task = None if other.task is done else other.task
        idle = [worker for worker in workers if worker.opening <= 0 and worker.task is None]
        for worker in idle[: len(todo)]:
            worker.begin(todo.pop(0))
            running[worker.task.piece] = 1  # type: ignore[union-attr]
            read += worker.reads
        idle = idle[len([w for w in idle if w.task]) :]
        idle_since = min(idle_since, now) if idle else math.inf
        again = overtaken(running, len(workers), now - idle_since, taken) if idle else ()
        for worker, piece in zip(idle, again, strict=False):
            worker.begin(by_piece[piece])
            running[piece] += 1
            read, twice = read + worker.reads, twice + 1
    return Run(hashing + driver_free, read, twice)


@dataclass(frozen=True)
class Case:
    """One line of the picture: a kind of build, at a site that grows."""

    name: str
    color: str
    counts: Sequence[int]
    site: Callable[[Plan, int], Site]


def by_cores(source_line: float, hub: bool) -> Callable[[Plan, int], Site]:
    """Nodes of 16 cores that round under an imatrix, two workers each."""

    def site(plan: Plan, nodes: int) -> Site:
        shard = source_bytes(plan.config) / SHARDS if hub else 0.0
        rate = CPU_CORE.by_imatrix * CORES / 2
        return Site(nodes, 2, rate, source_line=source_line, shard_bytes=shard, whole_layers=hub)

    return site


def by_gpus(plan: Plan, gpus: int) -> Site:
    """GPUs that round under an imatrix, each on a node of its own, from a shared folder."""
    return Site(gpus, 1, GPU.by_imatrix)


def calibrated(plan: Plan, nodes: int) -> Site:
    """Nodes of 16 cores that run and round whole layers from a calibration state."""
    config, threads = plan.config, CORES / 2
    products = zip(gather_products(config, USUAL_TOKENS), own_products(config, USUAL_TOKENS), strict=True)
    f32, f64 = (sum(pair) / config.num_hidden_layers for pair in products)
    layer = (f32 / CPU_CORE.f32 + f64 / CPU_CORE.f64) / threads
    rate = CPU_CORE.by_moments * threads
    return Site(nodes, 2, rate, layer_seconds=layer, whole_layers=True)


CASES = (
    Case("imatrix, hub over 10 Gbit/s", ORANGE, NODES, by_cores(10 * GIGABIT, hub=True)),
    Case("imatrix, shared folder of 5 GB/s", BLUE, NODES, by_cores(5e9, hub=False)),
    Case("imatrix on GPUs, shared folder", INK, GPUS, by_gpus),
    Case("calibrated, from a state", GREEN, NODES, calibrated),
)


def state_seconds(plan: Plan) -> float:
    """What making the calibration state takes on one node of 16 cores: it is the same for any number of nodes."""
    f32, f64 = gather_products(plan.config, USUAL_TOKENS)
    return (f32 / CPU_CORE.f32 + f64 / CPU_CORE.f64) / CORES


def results(plan: Plan, order: Sequence[WorkUnit], case: Case) -> dict[int, Run]:
    """The simulated builds of a case by the number of its nodes or GPUs."""
    out = {}
    for count in case.counts:
        site = case.site(plan, count)
        out[count] = simulate(site, tasks_of(plan, order, site), workers_of(site))
    return out


def table(found: Mapping[str, Mapping[int, Run]]) -> str:
    """Minutes of every case, in Markdown; in brackets the speed-up over one."""
    counts = sorted({count for runs in found.values() for count in runs})
    lines = [f"| nodes, or GPUs | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for count in counts:
        cells = [_cell(runs, count) for runs in found.values()]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: Mapping[int, Run], count: int) -> str:
    if count not in runs:
        return ""
    seconds, times = runs[count].seconds, runs[1].seconds / runs[count].seconds
    return f"{seconds / 60:.1f} min ({times:.1f} times)"


def picture(found: Mapping[str, Mapping[int, Run]]) -> str:
    """Minutes against nodes, both in powers, as SVG."""
    figure, axes = new(8, 4.2)
    axes.set(
        xlabel="nodes of 16 cores, or GPUs", ylabel="minutes for MiniMax-M2.7", xscale="log", yscale="log"
    )
    for case in CASES:
        runs = found[case.name]
        axes.plot(
            list(runs), [run.seconds / 60 for run in runs.values()], "o-", color=case.color, label=case.name
        )
    axes.set_xticks(NODES, [str(n) for n in NODES])
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    return svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tier", default="mq3")
    parser.add_argument("-o", "--output", type=Path, help="the picture, as SVG")
    given = parser.parse_args()
    recipe = load_tier(given.tier)
    plan = offline_plan(recipe, model_files(recipe.model))
    order = file_order(plan.tensors)
    found = {case.name: results(plan, order, case) for case in CASES}
    print(table(found))
    for name, runs in found.items():
        last = runs[max(runs)]
        print(f"{name}: reads {last.read / 1e9:.0f} GB at the largest size, {last.twice} slices done twice")
    print(f"a calibration state takes {state_seconds(plan) / 60:.0f} min on one node before that")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(picture(found), encoding="utf-8")


if __name__ == "__main__":
    main()
