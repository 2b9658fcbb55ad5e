"""How many requests a second at the same promise?  See README.md beside this file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from xllm_plugin.bench import plots, schema
from xllm_plugin.bench.commands import beside, conclude, model_folder, names_in
from xllm_plugin.bench.curve import percentile
from xllm_plugin.bench.ladder import Crossing, Ladder
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.promises import Promise, Verdict, judge, parse_promises
from xllm_plugin.bench.schedulers import Side, choose_sides, reference_of
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.traffic_options import TrafficOptions, traffic_options
from xllm_plugin.bench.trials import OUTPUTS_NOTE, Trial, open_stage

FOLDER = Path(__file__).parent
if TYPE_CHECKING:
    from benchmarks.slo_goodput.goodput import Search
else:
    Search = beside(FOLDER, "goodput").Search

NAME = "slo_goodput"
DATA = FOLDER.parent / "serving" / "data"

SIDES = "stock,stock-best,fcfs,fcfs-256,fcfs-64,priority,slo"
QUICK_SIDES = "fcfs,slo"
PROMISES, QUICK_PROMISES = "1000/50,500/35,4000/100", "1000/50"
RATIO = 1.41
"""Two rungs double the rate; between two neighbours the crossing is interpolated."""
SECONDS, QUICK_SECONDS = 16.0, 8.0
BEFORE_BURST_S, AFTER_BURST_S = 1.0, 5.0


def goodput_rows(search: Search) -> Iterator[Row]:
    """The headline: goodput of every side, and its ratio to the best static form, by promise."""
    for promise in search.promises:
        best = search.best_static(promise)
        base = search.crossings(best, promise) if best else {}
        for side in search.sides:
            found = search.crossings(side.name, promise)
            if not found:
                continue
            figures = [Figure.of("goodput", "req/s", [one.value for one in found.values()])]
            ratios = [
                found[repeat].value / base[repeat].value
                for repeat in found.keys() & base.keys()
                if base[repeat].value > 0
            ]
            if ratios and side.engine == search.stage.reference.engine:
                figures.append(Figure.of("times the best static", "", ratios))
            figures.append(Figure.of("repeats", "", [float(len(found))]))
            labels = {
                "promise, ms": str(promise),
                "side": side.name + (" (best static)" if side.name == best else ""),
                "engine": side.engine,
                "search": _search_label(list(found.values())),
            }
            title = f"Highest request rate at which {search.goal:.0%} keep the promise"
            yield Row(table=title, labels=labels, figures=tuple(figures))


def _search_label(found: Sequence[Crossing]) -> str:
    if not all(one.is_met for one in found):
        return "not kept at the lowest rate"
    return "found" if all(one.is_limit for one in found) else "at least this"


def rate_rows(search: Search) -> Iterator[Row]:
    """Every rate of every side, for the headline promise."""
    promise = search.promises[0]
    trials = {side.name: search.trials(side, promise) for side in search.sides}
    rates = sorted({t.key.requests_per_s for found in trials.values() for t in found})
    for rate in rates:
        for name, found in trials.items():
            at_rate = [trial for trial in found if trial.key.requests_per_s == rate]
            if at_rate:
                yield Row(
                    table=f"At every rate measured, {promise} ms",
                    labels={"req/s": f"{rate:g}", "side": name},
                    figures=_rate_figures(at_rate, promise),
                )


def _rate_figures(trials: Sequence[Trial], promise: Promise) -> tuple[Figure, ...]:
    judged = [trial.attainment(promise) for trial in trials]
    refused = [100 * one.counts[Verdict.REFUSED] / one.total for one in judged]
    figures = [Figure.of("kept", "%", [100 * one.share for one in judged])]
    ttfts = [[o.ttft_ms for o in t.outcomes if o.ttft_ms is not None] for t in trials]
    tpots = [[o.tpot_ms for o in t.outcomes if o.tpot_ms is not None] for t in trials]
    if all(ttfts):
        figures.append(Figure.of("TTFT p90", "ms", [percentile(v, 90) for v in ttfts]))
        figures.append(Figure.of("TPOT p90", "ms", [percentile(v, 90) for v in tpots]))
    return (*figures, Figure.of("refused", "%", refused))


def finished_check(search: Search) -> Check:
    """Whether there was time for every first search."""
    missing = [what for what, repeat in search.skipped if repeat == 0]
    return Check(
        name="every side and promise was searched at least once",
        passed=not missing,
        detail="no time for " + ", ".join(missing) if missing else "",
    )


def draw(search: Search, json_path: Path) -> list[Path]:
    """Write the pictures; none without matplotlib."""
    attainment = json_path.with_suffix(".png")
    burst = json_path.with_name(f"{json_path.stem}-burst.png")
    panels = {f"{promise} ms": _curves(search, promise) for promise in search.promises}
    labels = plots.Labels(
        x="requests/s",
        y="requests that keep the promise, %",
        bound=f"goal, {search.goal:.0%}",
        bound_y=100 * search.goal,
    )
    try:
        plots.plot_curves(
            panels, labels=labels, title="Promises (TTFT/TPOT) kept, by rate", path=attainment
        )
        return [attainment, burst] if _draw_burst(search, burst) else [attainment]
    except ImportError:
        return []


def _curves(search: Search, promise: Promise) -> dict[str, list[tuple[float, float]]]:
    trials = {side.name: search.trials(side, promise) for side in search.sides}
    return {name: _curve(found, promise) for name, found in trials.items() if found}


def _curve(trials: Sequence[Trial], promise: Promise) -> list[tuple[float, float]]:
    """Percent that kept the promise, the median over repeats, by rate."""
    shares: dict[float, list[float]] = {}
    for trial in trials:
        shares.setdefault(trial.key.requests_per_s, []).append(
            100 * trial.attainment(promise).share
        )
    return [(rate, Figure.of("", "", shares[rate]).median) for rate in sorted(shares)]


def _draw_burst(search: Search, path: Path) -> bool:
    """The first burst of the first repeat, at the lowest rate that the best static form fails."""
    promise = search.promises[0]
    best = search.best_static(promise)
    sides = [side for side in search.sides if side.name == best or side.is_slo]
    trials = {side.name: _first_repeat(search, side, promise) for side in sides}
    common = sorted(set.intersection(*map(set, trials.values()))) if trials else []
    if not common:
        return False
    of_first = trials[sides[0].name]
    broken = [r for r in common if of_first[r].attainment(promise).share < search.goal]
    rate = next(iter(broken), common[-1])
    traffic = search.stage.traffic
    begin_s, end_s = traffic.bursts.windows(traffic.window_s, f"{traffic.seed}:0")[0]
    shown_s = max(0.0, begin_s - BEFORE_BURST_S), end_s + AFTER_BURST_S
    plots.plot_burst(
        {name: _bars(found[rate], promise, shown_s) for name, found in trials.items()},
        burst_s=(begin_s, end_s),
        shown_s=shown_s,
        title=f"One burst at {rate:g} req/s, promise {promise} ms",
        path=path,
    )
    return True


def _first_repeat(search: Search, side: Side, promise: Promise) -> dict[float, Trial]:
    trials = search.trials(side, promise)
    return {trial.key.requests_per_s: trial for trial in trials if trial.key.repeat == 0}


def _bars(trial: Trial, promise: Promise, shown_s: tuple[float, float]) -> list[plots.RequestBar]:
    return [
        plots.RequestBar(o.due_s, o.first_s, o.last_s, judge(o, promise) is Verdict.MET)
        for o in trial.outcomes
        if shown_s[0] <= o.due_s <= shown_s[1]
    ]


def notes(search: Search, model: str) -> tuple[str, ...]:
    """How to read the figures."""
    traffic = search.stage.traffic
    left_out = [f"{what}, repeat {repeat + 1}" for what, repeat in search.skipped]
    found = (
        "Goodput is where the share that keeps the promise falls through "
        f"{search.goal:.0%}: between two neighbouring rates (ratio {RATIO:g}), interpolated; "
        "refused (429, 503), failed and ended requests count as violations. Ratios are taken "
        "within a repeat; every repeat has traffic of its own seed, the same for all sides. "
        "TTFT and TPOT are of the requests that got tokens."
    )
    return (
        traffic.describe(model),
        found,
        (
            "`best static` is the best of the sides on xllm's engine without "
            "`scheduler.policy=slo`, chosen after the fact, and for each promise anew. Of the "
            "chunk sizes the best is repeated. The forms of stock vLLM were searched once, on "
            "their own engine."
        ),
        OUTPUTS_NOTE,
        *(["Left out for lack of time: " + "; ".join(left_out) + "."] if left_out else []),
    )


NOT_SHOWN = (
    "One promise for all requests of a trial: how a scheduler weighs unequal ones.",
    "Trials are short: what hours of overload do to queues is another question.",
    "Prompts share no prefix and hold random tokens.",
    "Server and client share the machine's cores.",
)


@click.command(NAME)
@common_options(NAME)
@traffic_options
@click.option("--sides", help=f"In this order.  [default: {SIDES}]")
@click.option(
    "--promises",
    help=f"TTFT/TPOT in milliseconds, the first is the headline.  [default: {PROMISES}]",
)
@click.option(
    "--goal",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.9,
    show_default=True,
    help="Share of the requests that has to keep the promise.",
)
@click.option("--lowest-rate", type=click.FloatRange(min=0.05), default=0.5, show_default=True)
@click.option("--highest-rate", type=click.FloatRange(min=0.05), default=32.0, show_default=True)
@click.option(
    "--start-rate",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    help="Where the first search begins, requests a second.",
)
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@click.option("--most", type=click.IntRange(min=1), help="Trials of one search.  [default: 5]")
def command(
    *,
    quick: bool,
    json_path: Path,
    options: TrafficOptions,
    sides: str | None,
    promises: str | None,
    goal: float,
    lowest_rate: float,
    highest_rate: float,
    start_rate: float,
    repeats: int | None,
    most: int | None,
) -> None:
    """How many requests a second keep their latency promise, under which scheduler?

    Sends bursty traffic of recorded lengths, open loop, to one engine under vLLM's own scheduler in
    several settings and under xllm's, and searches the rate at which 90 % of all requests keep the
    promise.  Writes FILE (JSON) and two pictures beside it (PNG), and prints the tables.  Takes at
    most 35 minutes (--minutes); with --quick two.
    """
    ladder = Ladder.between(lowest_rate, highest_rate, RATIO)
    folder = model_folder(options.model)
    traffic = options.traffic(folder, DATA, default_seconds=QUICK_SECONDS if quick else SECONDS)
    judged = parse_promises(promises or (QUICK_PROMISES if quick else PROMISES))
    chosen = choose_sides(
        str(folder),
        names_in(sides or (QUICK_SIDES if quick else SIDES)),
        shlex.split(options.vllm_args),
    )
    repeats = repeats or (1 if quick else 3)
    console = Console()
    run = schema.begin(
        NAME,
        question=f"At which request rate do {goal:.0%} of all requests still keep their promise?",
        command=command_line(),
    )
    with open_stage(
        traffic,
        judged,
        reference_of(chosen),
        console,
        steps=len(chosen) * len(judged) * repeats,
        limit_s=options.minutes * 60,
        keep_logs=options.keep_logs,
    ) as stage:
        search = Search(
            stage=stage,
            ladder=ladder,
            sides=chosen,
            promises=judged,
            repeats=repeats,
            goal=goal,
            most=most or (2 if quick else 5),
            start_rate=start_rate,
        )
        search.run()
    result = run.finish(
        peers=[side.server.record(str(folder)) for side in chosen],
        rows=[*goodput_rows(search), *rate_rows(search)],
        checks=[*stage.checks(), finished_check(search)],
        notes=notes(search, folder.name),
        not_shown=NOT_SHOWN,
        details=search.details(),
    )
    pictures = draw(search, json_path)
    console.print(f"pictures: {', '.join(map(str, pictures)) or 'none, matplotlib is missing'}")
    conclude(result, json_path, console)
