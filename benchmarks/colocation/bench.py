"""How much offline work fits into the gaps of online work?  See README.md beside this file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from xllm_plugin.bench import plots, schema
from xllm_plugin.bench.commands import beside, conclude, model_folder, names_in
from xllm_plugin.bench.ladder import Ladder
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.promises import Promise, parse_promises
from xllm_plugin.bench.schedulers import Side, choose_sides, reference_of
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.traffic_options import TrafficOptions, traffic_options
from xllm_plugin.bench.trials import OUTPUTS_NOTE, Trial, open_stage
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parent
if TYPE_CHECKING:
    from benchmarks.colocation.backlog import Found, Search
else:
    backlog = beside(FOLDER, "backlog")
    Found, Search = backlog.Found, backlog.Search

NAME = "colocation"
DATA = FOLDER.parent / "serving" / "data"
GOODPUT = FOLDER.parent / "slo_goodput" / "result.json"

SIDES = "priority,slo"
LOADS, QUICK_LOADS = "50,80", "50"
SECONDS, QUICK_SECONDS = 40.0, 6.0


def offline_rows(search: Search) -> Iterator[Row]:
    """The headline: offline throughput within the bound, and its ratio to the best static form."""
    for load in search.loads_percent:
        best = search.best_static(load)
        base = search.of(best, load) if best else {}
        for side in search.sides:
            found = search.of(side, load)
            if not found:
                continue
            speeds = [one.offline_output_tok_s for one in found.values()]
            figures = [Figure.of("offline output", "tok/s", speeds)]
            ratios = [
                found[repeat].offline_output_tok_s / base[repeat].offline_output_tok_s
                for repeat in found.keys() & base.keys()
                if base[repeat].offline_output_tok_s > 0
            ]
            if best and ratios:
                figures.append(Figure.of(f"times {best.name}", "", ratios))
            figures += _kept_figures(list(found.values()), search.promise)
            yield Row(
                table=_headline(search),
                labels={
                    "online load": _load(search, load),
                    "side": side.name,
                    "search": _search_label(list(found.values())),
                },
                figures=tuple(figures),
            )


def _headline(search: Search) -> str:
    return (
        f"Offline throughput while at most {search.max_violations:.0%} of the online requests "
        f"miss {search.promise} ms"
    )


def _load(search: Search, load: float) -> str:
    return f"{load:g} % ({search.rate(load):g} req/s)"


def _search_label(found: Sequence[Found]) -> str:
    if not any(one.best for one in found):
        return "no offline work keeps the bound"
    return "found" if all(one.is_limit for one in found) else "at least this"


def _kept_figures(found: Sequence[Found], promise: Promise) -> list[Figure]:
    """Of the trials within the bound (without offline work where none is)."""
    trials = [one.best or one.alone for one in found]
    missed = [100 * trial.attainment(promise).violations for trial in trials]
    alone = [100 * one.alone.attainment(promise).violations for one in found]
    return [
        Figure.of("with prompts", "tok/s", [trial.offline_tok_s for trial in trials]),
        Figure.of("offline at once", "", [float(trial.key.backlog) for trial in trials]),
        Figure.of("online missed", "%", missed),
        Figure.of("missed without offline work", "%", alone),
    ]


def backlog_rows(search: Search) -> Iterator[Row]:
    """Every backlog of every side and load."""
    for load in search.loads_percent:
        backlogs = sorted({trial.key.backlog for trial in _trials(search, load)})
        for backlog in backlogs:
            for side in search.sides:
                trials = [t for t in _trials(search, load, side) if t.key.backlog == backlog]
                if not trials:
                    continue
                missed = [100 * t.attainment(search.promise).violations for t in trials]
                speeds = [trial.offline_output_tok_s for trial in trials]
                figures = (
                    Figure.of("online missed", "%", missed),
                    Figure.of("offline output", "tok/s", speeds),
                )
                yield Row(
                    table="At every backlog measured",
                    labels={
                        "online load": _load(search, load),
                        "offline at once": str(backlog),
                        "side": side.name,
                    },
                    figures=figures,
                )


def _trials(search: Search, load: float, side: Side | None = None) -> list[Trial]:
    return [
        trial
        for key, trial in search.stage.trials.items()
        if key.requests_per_s == search.rate(load) and (side is None or key.side == side.name)
    ]


def finished_check(search: Search) -> Check:
    """Whether there was time for every first search."""
    missing = [what for what, repeat in search.skipped if repeat == 0]
    return Check(
        name="every side and load was searched at least once",
        passed=not missing,
        detail="no time for " + ", ".join(missing) if missing else "",
    )


def draw(search: Search, path: Path) -> bool:
    """Write the picture; False without matplotlib."""
    panels = {_load(search, load): _curves(search, load) for load in search.loads_percent}
    labels = plots.Labels(
        x="offline output, tokens/s",
        y="online requests that miss the promise, %",
        bound=f"bound, {search.max_violations:.0%}",
        bound_y=100 * search.max_violations,
    )
    try:
        plots.plot_curves(
            panels, labels=labels, title="What offline work costs online requests", path=path
        )
    except ImportError:
        return False
    return True


def _curves(search: Search, load: float) -> dict[str, list[tuple[float, float]]]:
    """Medians over the repeats of a backlog, by backlog."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for side in search.sides:
        trials = _trials(search, load, side)
        for backlog in sorted({trial.key.backlog for trial in trials}):
            same = [trial for trial in trials if trial.key.backlog == backlog]
            speed = Figure.of("", "", [trial.offline_output_tok_s for trial in same])
            missed = Figure.of("", "", [t.attainment(search.promise).violations for t in same])
            curves.setdefault(side.name, []).append((speed.median, 100 * missed.median))
    return curves


def notes(search: Search, model: str, origin: str) -> tuple[str, ...]:
    """How to read the figures."""
    left_out = [f"{what}, repeat {repeat + 1}" for what, repeat in search.skipped]
    return (
        search.stage.traffic.describe(model),
        (
            f"Online load is a share of {search.goodput_rate:g} req/s ({origin}). The backlog "
            "keeps a number of offline requests of the same lengths at the server, from 3 s before "
            "the first online arrival to the end of the last online request; offline tokens count "
            "within the window of arrivals. The number doubles until the bound breaks: an operator "
            "of a static scheduler would have to find the same number and live with it."
        ),
        (
            "Refused (429, 503), failed and ended online requests count as missed. Ratios are "
            "taken within a repeat; every repeat has traffic of its own seed, the same for all "
            "sides."
        ),
        OUTPUTS_NOTE,
        *(["Left out for lack of time: " + "; ".join(left_out) + "."] if left_out else []),
    )


NOT_SHOWN = (
    "Offline requests of other lengths than the online ones, and a backlog that runs dry.",
    "A few hundred online requests a cell: shares of a percent are not resolved.",
    "Prompts share no prefix and hold random tokens.",
    "Server and client share the machine's cores.",
)


def goodput_rate(given: float | None, promise: Promise, path: Path) -> tuple[float, str]:
    """The rate that loads are shares of, and where it comes from.

    Raises `ConfigError` when none was given and `path` has none for this promise.
    """
    if given is not None:
        return given, "--goodput-rate"
    try:
        details = schema.load(path).details
        best = details["best_static"][str(promise)]
        rate = Figure.of("", "", details["goodput_req_s"][str(promise)][best]).median
    except (ConfigError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} gives no goodput at {promise} ms ({error}); run `xllm bench slo_goodput "
            f"--json {path}` first, or give --goodput-rate"
        ) from error
    if not rate > 0:
        raise ConfigError(f"{path} has a goodput of 0 at {promise} ms; give --goodput-rate")
    return rate, f"goodput of {best} in benchmarks/slo_goodput"


def parse_loads(text: str) -> tuple[float, ...]:
    """Read `50,80`, percent.  Raises `ConfigError` for others."""
    try:
        loads = tuple(float(part) for part in names_in(text))
    except ValueError as error:
        raise ConfigError(f"loads {text!r}: write percent, e.g. 50,80") from error
    if not loads or not all(0 < load < float("inf") for load in loads):
        raise ConfigError(f"loads {text!r}: give percent above 0, e.g. 50,80")
    return loads


def details(search: Search) -> dict[str, Any]:
    """Every trial, for the result."""
    promises = search.stage.promises
    return {
        "goodput_req_s": search.goodput_rate,
        "ready_s": search.stage.fleet.ready_s,
        "trials": [trial.summary(promises) for trial in search.stage.trials.values()],
    }


@click.command(NAME)
@common_options(NAME)
@traffic_options
@click.option("--sides", default=SIDES, show_default=True, help="In this order.")
@click.option("--promise", default="1000/50", show_default=True, help="TTFT/TPOT, milliseconds.")
@click.option(
    "--goodput-rate",
    "rate",
    type=click.FloatRange(min=0.05),
    help="Requests a second that loads are shares of.  [default: what slo_goodput found]",
)
@click.option("--loads", help=f"Online loads, percent of that rate.  [default: {LOADS}]")
@click.option(
    "--max-violations",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.03,
    show_default=True,
    help="Share of the online requests that may miss the promise.",
)
@click.option("--max-backlog", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@click.option("--most", type=click.IntRange(min=1), help="Backlogs of one search.  [default: 5]")
def command(
    *,
    quick: bool,
    json_path: Path,
    options: TrafficOptions,
    sides: str,
    promise: str,
    rate: float | None,
    loads: str | None,
    max_violations: float,
    max_backlog: int,
    repeats: int | None,
    most: int | None,
) -> None:
    """How much offline work fits into the gaps of online work?

    Sends bursty online traffic at shares of the rate that stock's scheduler sustains, keeps an
    offline backlog beside it, and searches the largest backlog at which at most 3 % of the online
    requests miss their promise: under vLLM's priority scheduling and under xllm's.  Writes FILE
    (JSON) and a picture beside it (PNG), and prints the tables.  Takes at most 35 minutes
    (--minutes); with --quick two.
    """
    judged = parse_promises(promise)[:1]
    online_rate, origin = goodput_rate(rate, judged[0], GOODPUT)
    shares = parse_loads(loads or (QUICK_LOADS if quick else LOADS))
    folder = model_folder(options.model)
    traffic = options.traffic(folder, DATA, default_seconds=QUICK_SECONDS if quick else SECONDS)
    chosen = choose_sides(str(folder), names_in(sides), shlex.split(options.vllm_args))
    repeats = repeats or (1 if quick else 3)
    console = Console()
    run = schema.begin(
        NAME,
        question="How much offline work fits into the gaps of online work with its promise kept?",
        command=command_line(),
    )
    with open_stage(
        traffic,
        judged,
        reference_of(chosen),
        console,
        steps=len(chosen) * len(shares) * repeats,
        limit_s=options.minutes * 60,
        keep_logs=options.keep_logs,
    ) as stage:
        search = Search(
            stage=stage,
            backlogs=Ladder.between(1, max_backlog, 2),
            sides=chosen,
            loads_percent=shares,
            goodput_rate=online_rate,
            repeats=repeats,
            max_violations=max_violations,
            most=most or (2 if quick else 5),
        )
        search.run()
    result = run.finish(
        peers=[side.server.record(str(folder)) for side in chosen],
        rows=[*offline_rows(search), *backlog_rows(search)],
        checks=[*stage.checks(), finished_check(search)],
        notes=notes(search, folder.name, origin),
        not_shown=NOT_SHOWN,
        details=details(search),
    )
    picture = json_path.with_suffix(".png")
    drawn = draw(search, picture)
    console.print(f"picture: {picture if drawn else 'none, matplotlib is missing'}")
    conclude(result, json_path, console)
