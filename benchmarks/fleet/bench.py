"""How well does the service choose among many instances?  See README.md beside this file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from xllm_plugin.bench import plots, schema
from xllm_plugin.bench.commands import beside, conclude, names_in
from xllm_plugin.bench.fleet_simulator.cache_aware import CacheAware, CacheAwareSettings
from xllm_plugin.bench.fleet_simulator.decisions import decision_us
from xllm_plugin.bench.fleet_simulator.profile import load_profile
from xllm_plugin.bench.fleet_simulator.promises import (
    Share,
    ShareSummary,
    by_share,
    with_promises,
)
from xllm_plugin.bench.fleet_simulator.simulation import InstanceSpec, Run, simulate
from xllm_plugin.bench.fleet_simulator.summary import Promise, Summary, quantile, summarise
from xllm_plugin.bench.fleet_simulator.workload import Arrival, Trace, arrivals, read_trace
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.errors import ConfigError, PlatformError
from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.service.policy import RoutingPolicy, Slo
from xllm_plugin.service.process import is_compiled

FOLDER = Path(__file__).resolve().parent
weighing = beside(FOLDER, "weights")
NAME = "fleet"
NAME_WEIGHTS = "fleet_weights"
QUESTION = "How soon do requests get their first token, and how many keep their promise, by policy?"
DEFAULT: Final = "cost"
BLIND: Final = "cost-blind"
PEERS: Final = {
    "cache-aware": (
        CacheAwareSettings(),
        "approximate prefixes with thresholds, as sglang's gateway and vllm-router start",
    ),
    "cache-aware-tight": (
        CacheAwareSettings(cache_threshold=0.5, balance_abs_threshold=8, balance_rel_threshold=1.1),
        "the same with thresholds for few requests an instance",
    ),
}
OURS: Final = (DEFAULT, "round-robin", "least-loaded")
WITH_PROMISES: Final = (DEFAULT, BLIND, "least-loaded", *PEERS)
AIM_RATIO: Final = 2.0
NEARLY_ALL: Final = 0.9


@dataclass(frozen=True, slots=True)
class Case:
    """A trace before a fleet.  Loads are requests a second and instance."""

    name: str
    trace: Path
    profile: str
    loads: tuple[float, ...]
    promise: Promise
    shorten: int = 1
    shorten_outputs: int = 1
    copies: int = 1
    has_prefixes: bool = True
    slowness: tuple[float, ...] = (1.0,)
    """Of the instances, one after the other and then again: times as long as the profile says."""
    shares: tuple[Share, ...] = ()
    """With them requests carry promises of their own, and `promise` is not asked for."""

    @property
    def block_tokens(self) -> int:
        """That one hash stands for."""
        return 512 // self.shorten

    def read(self, at_most: int | None = None) -> Trace:
        """Its trace, or so many requests from the start."""
        return read_trace(
            self.trace,
            shorten=self.shorten,
            shorten_outputs=self.shorten_outputs,
            at_most=at_most,
        )


MOONCAKE: Final = FOLDER / "data" / "mooncake-conversation.jsonl"
AZURE: Final = FOLDER.parent / "serving" / "data" / "azure-conv.jsonl"
CASES: Final = (
    Case(
        "Mooncake conversation, Llama 2 70B on DGX-H100",
        MOONCAKE,
        "llama2-70b-dgx-h100",
        (0.12, 0.2, 0.28, 0.36, 0.44),
        Promise(ttft_s=10.0, tpot_s=0.25),
    ),
    Case(
        "Mooncake conversation shortened, SmolLM2 on two CPU cores",
        MOONCAKE,
        "smollm2-2-cores",
        (0.8, 1.6, 2.2, 2.8),
        Promise(ttft_s=2.0, tpot_s=0.25),
        shorten=32,
        shorten_outputs=4,
    ),
    Case(
        "Azure conversation, Llama 2 70B on DGX-H100",
        AZURE,
        "llama2-70b-dgx-h100",
        (2.0, 3.0, 4.0, 5.0),
        Promise(ttft_s=2.0, tpot_s=0.25),
        copies=4,
        has_prefixes=False,
    ),
)


def _shares(interactive: Slo, relaxed: Slo) -> tuple[Share, ...]:
    return (
        Share("interactive", interactive),
        Share("relaxed", relaxed),
        Share("offline", Slo(is_offline=True)),
    )


PROMISED: Final = (
    replace(
        CASES[0],
        name="Mooncake conversation with promises, Llama 2 70B on DGX-H100",
        loads=(0.2, 0.32),
        shares=_shares(Slo(4.0, 0.1), Slo(15.0, 0.3)),
    ),
    replace(
        CASES[2],
        name="Azure conversation with promises, Llama 2 70B on DGX-H100",
        loads=(3.0, 4.5),
        shares=_shares(Slo(0.5, 0.125), Slo(2.0, 0.3)),
    ),
)
ALL: Final = (*CASES, *PROMISED)
WEIGHED: Final = (
    replace(PROMISED[0], loads=(0.32,)),
    replace(PROMISED[1], loads=(4.5,)),
    *(
        replace(case, name=f"{case.name}, uneven", loads=(load,), slowness=(1.0, 1.8))
        for case, load in zip(PROMISED, (0.22, 3.0), strict=True)
    ),
)
"""What `--weights` looks at."""
PROMISED_REPEATS: Final = 3
SIZES: Final = (4, 16, 64, 256, 1000)
DECISION_SIZES: Final = (2, 8, 64, 256, 1000)


def policy_named(name: str, traffic: Sequence[Arrival], block_tokens: int) -> RoutingPolicy:
    """One that the service registers, or a peer's with an empty memory."""
    if name in PEERS:
        peer = CacheAware(lambda number: traffic[number].blocks, block_tokens, PEERS[name][0])
        return peer.policy(name)
    return routing_policies(build_manager(""))[DEFAULT if name == BLIND else name]


def known_policies() -> tuple[str, ...]:
    """All that can be compared."""
    return (*routing_policies(build_manager("")), *PEERS, BLIND)


@dataclass(slots=True)
class Bench:
    """Runs cases and keeps what came out."""

    instances: int
    repeats: int
    console: Console
    found: dict[tuple[str, float, str], list[Summary]] = field(default_factory=dict)
    shares: dict[tuple[str, float, str], list[dict[str, ShareSummary]]] = field(
        default_factory=dict
    )

    def run_case(self, case: Case, policies: Sequence[str], at_most: int | None) -> None:
        """Every load, every policy, every repeat."""
        trace = case.read(at_most)
        for load in case.loads:
            for repeat in range(self.repeats):
                for name in policies:
                    began = time.perf_counter()
                    summary = self.one(case, trace, load, name, seed=repeat)
                    self.found.setdefault((case.name, load, name), []).append(summary)
                    self.console.print(
                        f"{case.name}, {load:g}/s, {name}: TTFT p90 {summary.ttft_p90_s:.2f} s, "
                        f"goodput {summary.goodput:.1%}, hits {summary.hit_share:.1%}, "
                        f"busy {summary.busy_share:.0%} ({time.perf_counter() - began:.1f} s)",
                        highlight=False,
                    )

    def run_promised(
        self, case: Case, policies: Sequence[str], repeats: int, at_most: int | None
    ) -> None:
        """The same where requests carry promises; each repeat draws who has which."""
        trace = case.read(at_most)
        for load in case.loads:
            for repeat in range(repeats):
                untold = arrivals(trace, load * self.instances, copies=case.copies, seed=repeat)
                told = with_promises(untold, case.shares, repeat)
                for name in policies:
                    traffic = untold if name == BLIND else told
                    run = run_fleet(case, name, traffic, self.instances, seed=repeat)
                    shares = by_share(run.served, told, case.shares)
                    self.shares.setdefault((case.name, load, name), []).append(shares)
                    kept = ", ".join(
                        f"{share} {one.num_kept / one.num_requests:.1%}"
                        for share, one in shares.items()
                    )
                    self.console.print(f"{case.name}, {load:g}/s, {name}: {kept}", highlight=False)

    def one(self, case: Case, trace: Trace, load: float, name: str, *, seed: int) -> Summary:
        """One run."""
        traffic = arrivals(trace, load * self.instances, copies=case.copies, seed=seed)
        run = run_fleet(case, name, traffic, self.instances, seed=seed)
        span_s = traffic[-1].at_s - traffic[0].at_s
        return summarise(run.served, run.busy_s, case.promise, span_s)


def run_fleet(
    case: Case, name: str, traffic: Sequence[Arrival], num_instances: int, *, seed: int
) -> Run:
    """A case's instances under one policy."""
    return simulate(
        policy_named(name, traffic, case.block_tokens),
        traffic,
        load_profile(FOLDER / "profiles" / f"{case.profile}.json"),
        [InstanceSpec(case.slowness[n % len(case.slowness)]) for n in range(num_instances)],
        block_tokens=case.block_tokens,
        seed=seed,
    )


def rows(bench: Bench, cases: Sequence[Case], policies: Sequence[str]) -> list[Row]:
    """One table a case, its ratios, and the aims."""
    found = []
    for case in cases:
        for load in case.loads:
            for name in policies:
                runs = bench.found[case.name, load, name]
                labels = {"load, requests/s an instance": f"{load:g}", "policy": name}
                found.append(Row(table=case.name, labels=labels, figures=tuple(_figures(runs))))
    for case in cases:
        others = [name for name in policies if name != DEFAULT]
        if DEFAULT not in policies or not others:
            continue
        for load in case.loads:
            ratios = tuple(
                Figure.of(f"{name} / {DEFAULT}", "", _ratios(bench, case, load, name))
                for name in others
            )
            labels = {"load, requests/s an instance": f"{load:g}"}
            title = f"{case.name}: TTFT p90 of a policy over that of `{DEFAULT}`"
            found.append(Row(table=title, labels=labels, figures=ratios))
    return found


def _figures(runs: Sequence[Summary]) -> Iterable[Figure]:
    def of(name: str, unit: str, values: Iterable[float], digits: int) -> Figure:
        return Figure.of(name, unit, [round(value, digits) for value in values])

    yield of("TTFT p50", "s", (run.ttft_p50_s for run in runs), 3)
    yield of("TTFT p90", "s", (run.ttft_p90_s for run in runs), 3)
    yield of("TTFT p99", "s", (run.ttft_p99_s for run in runs), 3)
    yield of("TPOT p90", "ms", (run.tpot_p90_s * 1e3 for run in runs), 1)
    yield of("goodput", "%", (run.goodput * 100 for run in runs), 2)
    yield of("prompt tokens cached", "%", (run.hit_share * 100 for run in runs), 1)
    yield of("imbalance", "", (run.imbalance for run in runs), 3)
    yield of("busy", "%", (run.busy_share * 100 for run in runs), 1)


def promised_rows(bench: Bench, cases: Sequence[Case], policies: Sequence[str]) -> list[Row]:
    """What each kind of request got: one table a case."""
    return [
        Row(
            table=case.name,
            labels={"load, requests/s an instance": f"{load:g}", "policy": name},
            figures=tuple(_promised_figures(bench.shares[case.name, load, name])),
        )
        for case in cases
        for load in case.loads
        for name in policies
    ]


def _promised_figures(runs: Sequence[Mapping[str, ShareSummary]]) -> Iterable[Figure]:
    def of(name: str, unit: str, share: str, value: Callable[[ShareSummary], float]) -> Figure:
        return Figure.of(name, unit, [round(value(run[share]), 3) for run in runs])

    for share in ("interactive", "relaxed"):
        yield of(f"{share} kept", "%", share, lambda one: 100 * one.num_kept / one.num_requests)
    yield of("interactive TTFT p90", "s", "interactive", lambda one: one.ttft_p90_s)
    yield of("interactive TPOT p90", "ms", "interactive", lambda one: 1e3 * one.tpot_p90_s)
    yield of("relaxed TTFT p90", "s", "relaxed", lambda one: one.ttft_p90_s)
    yield of("offline, mean to its end", "s", "offline", lambda one: one.mean_s)


def promised_aims(bench: Bench, cases: Sequence[Case], policies: Sequence[str]) -> list[Row]:
    """Whether promises kept grow by knowing them, and are more than with others."""
    others = [name for name in policies if name != DEFAULT]
    if DEFAULT not in policies or not others:
        return []
    found = []
    for case in cases:
        ahead = min(
            _kept(bench.shares[case.name, load, DEFAULT])
            - _kept(bench.shares[case.name, load, name])
            for load in case.loads
            for name in others
        )
        what = "smallest lead in promises kept, any load and policy, points"
        found.append(_aim(case, what, "at least 0", ahead * 100))
    return found


def _kept(runs: Sequence[Mapping[str, ShareSummary]]) -> float:
    """Share of the promises that were kept; offline requests have none."""
    kinds = [[one for name, one in run.items() if name != "offline"] for run in runs]
    return statistics.median(
        sum(one.num_kept for one in ones) / sum(one.num_requests for one in ones) for ones in kinds
    )


def _ratios(bench: Bench, case: Case, load: float, name: str) -> list[float]:
    ours, theirs = (bench.found[case.name, load, each] for each in (DEFAULT, name))
    return [
        round(their.ttft_p90_s / our.ttft_p90_s, 3) for our, their in zip(ours, theirs, strict=True)
    ]


def saturation(bench: Bench, case: Case) -> float | None:
    """The highest load at which nine in ten still keep their promise under the default policy."""
    kept = [
        load
        for load in case.loads
        if _median(bench.found[case.name, load, DEFAULT], "goodput") >= NEARLY_ALL
    ]
    return max(kept, default=None)


def _median(runs: Sequence[Summary], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def aims(bench: Bench, cases: Sequence[Case], policies: Sequence[str]) -> list[Row]:
    """What was wanted, and what was found; reported whether reached or not."""
    found = []
    others = [name for name in policies if name != DEFAULT]
    if DEFAULT not in policies or not others:
        return []
    for case in cases:
        worst_ttft = min(
            statistics.median(_ratios(bench, case, load, name))
            for load in case.loads
            for name in others
        )
        behind = max(
            _median(bench.found[case.name, load, name], "goodput")
            - _median(bench.found[case.name, load, DEFAULT], "goodput")
            for load in case.loads
            for name in others
        )
        found += [
            _aim(case, "worst ratio of TTFT p90, any load and policy", "at least 1", worst_ttft),
            _aim(case, "most that another keeps more, any load, points", "at most 0", behind * 100),
        ]
        peers = [name for name in others if name in PEERS]
        load = saturation(bench, case)
        if case.has_prefixes and peers and load is not None:
            ratio = min(statistics.median(_ratios(bench, case, load, name)) for name in peers)
            what = f"TTFT p90 of the better cache-aware, times ours, at {load:g}/s"
            found.append(_aim(case, what, f"at least {AIM_RATIO:g}", ratio))
    return found


def _aim(case: Case, what: str, aim: str, value: float) -> Row:
    labels = {"case": case.name, "what": what, "aim": aim}
    return Row(
        table="What was aimed at",
        labels=labels,
        figures=(Figure.of("found", "", [round(value, 3)]),),
    )


def sizes(
    case: Case, load: float, counts: Sequence[int], console: Console, at_most: int | None = None
) -> list[Row]:
    """The default policy before fleets of several sizes, at the same load an instance."""
    found = []
    trace = case.read()
    for count in counts:
        copies = max(1, round(count / 64))
        traffic = arrivals(trace, load * count, copies=copies)[: at_most or max(2000, 10 * count)]
        began = time.perf_counter()
        run = run_fleet(case, DEFAULT, traffic, count, seed=0)
        spent_s = time.perf_counter() - began
        decisions_us = [seconds * 1e6 for seconds in run.decision_s]
        ttfts = [one.ttft_s for one in run.served]
        figures = (
            Figure.of("requests", "", [len(run.served)]),
            Figure.of("CPU of a decision, p50", "us", [round(quantile(decisions_us, 0.5), 1)]),
            Figure.of("CPU of a decision, p99", "us", [round(quantile(decisions_us, 0.99), 1)]),
            Figure.of("TTFT p90", "s", [round(quantile(ttfts, 0.9), 3)]),
            Figure.of("simulated", "s", [round(run.end_s, 1)]),
            Figure.of("in", "s", [round(spent_s, 1)]),
        )
        found.append(Row(table="Size", labels={"instances": str(count)}, figures=figures))
        console.print(f"{count} instances: {spent_s:.1f} s", highlight=False)
    return found


def decision_costs(counts: Sequence[int], *, decisions: int) -> list[Row]:
    """What each policy of the service takes to choose, by the size of the fleet."""
    policies = routing_policies(build_manager(""))
    return [
        Row(
            table="CPU of a decision alone",
            labels={"instances": str(count)},
            figures=tuple(
                Figure.of(
                    name,
                    "us",
                    [round(one, 1) for one in decision_us(policy, count, decisions=decisions)],
                )
                for name, policy in policies.items()
            ),
        )
        for count in counts
    ]


def checks(bench: Bench, cases: Sequence[Case], policies: Sequence[str]) -> list[Check]:
    """Nothing is lost (a run raises if it is), and a run can be repeated."""
    case, load = cases[0], cases[0].loads[0]
    trace = case.read(200)
    once, again = (bench.one(case, trace, load, policies[0], seed=0) for _ in range(2))
    num_requests = sum(run.num_requests for runs in bench.found.values() for run in runs)
    num_requests += sum(
        one.num_requests for runs in bench.shares.values() for run in runs for one in run.values()
    )
    return [
        Check(
            name="every request ended once, none was rejected",
            passed=True,
            detail=f"{num_requests} requests; a run that loses one raises",
        ),
        Check(name="a run gives the same again", passed=once == again, detail=policies[0]),
    ]


def plot(bench: Bench, cases: Sequence[Case], policies: Sequence[str], path: Path) -> None:
    """TTFT p90 over load, a panel a case.  Raises `ImportError` without matplotlib."""
    panels = {
        case.name.replace(", ", "\n"): {
            name: [
                (load, _median(bench.found[case.name, load, name], "goodput") * 100)
                for load in case.loads
            ]
            for name in policies
        }
        for case in cases
    }
    labels = plots.Labels("requests/s an instance", "goodput, %", "nine in ten", NEARLY_ALL * 100)
    plots.plot_curves(panels, labels=labels, title="Requests that keep their promise", path=path)


NOTES = (
    (
        "Time is simulated; what decides is the service's router, fleet, prefix index and "
        "policies, unchanged. Every request is served, however late, and counts."
    ),
    (
        "A load compresses the trace's own time. Repeats differ in the seed: beats of heartbeats, "
        "draws, and, where a trace is taken several times, when each copy begins."
    ),
    "Imbalance: busy time of the busiest instance over the mean. Busy: until the last arrival.",
    (
        "With promises: of each kind's requests, those that keep their own; who has which is drawn "
        "for each repeat."
    ),
    (
        "A decision's time is processor time of this machine. In the table of sizes it has the "
        "lookup of the prompt with it; the last table has the router's choice and its booking "
        "alone, in a fleet at work (xllm_plugin/bench/fleet_simulator/decisions.py)."
    ),
)
NOT_SHOWN = (
    (
        "The coefficients of a step are a sum of five terms; details has how far each measured "
        "point is from it."
    ),
    "Output tokens found in a cache by the next turn: the trace has hashes of prompts only.",
    "Instances that fail, several services before one fleet, instances of several models.",
)


@click.command(NAME)
@common_options(NAME)
@click.option(
    "--policies", help="In this order.  [default: cost, round-robin, least-loaded, peers]"
)
@click.option("--instances", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--cases",
    "case_numbers",
    help="Of 1 to 5: Mooncake, Mooncake on CPU, Azure; Mooncake and Azure with promises.",
)
@click.option("--loads", help="Requests a second and instance, for all cases.")
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 1]")
@click.option("--sizes/--no-sizes", "with_sizes", default=True, help="Fleets of several sizes too.")
@click.option(
    "--weights",
    metavar="OFFLINE:LATE,...",
    help="Only these weights of promises in the default policy, on cases of their own.",
)
def command(
    *,
    quick: bool,
    json_path: Path,
    policies: str | None,
    instances: int,
    case_numbers: str | None,
    loads: str | None,
    repeats: int | None,
    with_sizes: bool,
    weights: str | None,
) -> None:
    """Simulate a fleet under recorded traffic, with the service's own routing code.

    No server is started; a run of 5,700 requests takes seconds.
    """
    if is_compiled():
        raise PlatformError(
            "the service is compiled here, and its router takes no simulated requests; run this in "
            "an environment with a checkout (`make .venv/.dev`) or a wheel that is not compiled."
        )
    few = 200 if quick else None
    if weights is not None:
        run_weights(weights, WEIGHED[:1] if quick else WEIGHED, instances, repeats, few, json_path)
        return
    asked = names_in(policies) if policies is not None else None
    unknown = [name for name in asked or () if name not in known_policies()]
    if unknown or asked == ():
        raise ConfigError(
            f"policies {', '.join(unknown) or '(none)'} are not here; there are "
            f"{', '.join(known_policies())}."
        )
    names = asked or (*OURS, *PEERS)
    promised_names = asked or WITH_PROMISES
    chosen = chosen_cases(case_numbers, loads, quick=quick)
    cases = [case for case in chosen if not case.shares]
    promised = [case for case in chosen if case.shares]
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    bench = Bench(instances, repeats or 1, console)
    for case in cases:
        bench.run_case(case, names, few)
    for case in promised:
        bench.run_promised(case, promised_names, repeats or PROMISED_REPEATS, few)
    table = [*aims(bench, cases, names), *promised_aims(bench, promised, promised_names)]
    table += rows(bench, cases, names)
    table += promised_rows(bench, promised, promised_names)
    if with_sizes:
        table += sizes(chosen[0], chosen[0].loads[0], SIZES[:1] if quick else SIZES, console, few)
        table += decision_costs(DECISION_SIZES, decisions=20 if quick else 400)
    profiles = {case.profile for case in chosen}
    used = (*(names if cases else ()), *(promised_names if promised else ()))
    result = run.finish(
        peers=[_record(name) for name in dict.fromkeys(used)],
        rows=table,
        checks=checks(bench, chosen, names),
        notes=NOTES,
        not_shown=NOT_SHOWN,
        details=_details(bench, profiles),
    )
    picture = json_path.with_suffix(".png")
    try:
        if cases:
            plot(bench, cases, names, picture)
    except ImportError:
        console.print("no picture: matplotlib is missing")
    conclude(result, json_path, console)


def run_weights(  # noqa: PLR0917 - what the command was told
    text: str,
    cases: Sequence[Case],
    instances: int,
    repeats: int | None,
    at_most: int | None,
    json_path: Path,
) -> None:
    """The default policy with other weights, a table a case."""
    grid = weighing.parsed(text)
    run = schema.begin(NAME_WEIGHTS, question=QUESTION, command=command_line())
    console, outcomes = Console(), []
    table: list[Row] = []
    for case in cases:
        trace, (load,) = case.read(at_most), case.loads

        def one(weights: Any, repeat: int, case: Case = case, trace: Trace = trace) -> Any:
            found = weighed(case, trace, instances, weights, repeat)
            outcomes.append(found)
            return found

        title = f"{case.name}, {load:g} requests/s an instance"
        table += weighing.rows(title, one, grid, repeats or PROMISED_REPEATS, console.print)
    result = run.finish(
        peers=[], rows=table, checks=weighing.checks(outcomes), notes=weighing.NOTES, not_shown=()
    )
    conclude(result, json_path, console)


def weighed(case: Case, trace: Trace, instances: int, weights: Any, repeat: int) -> Any:
    """One run of a case's only load; `weights` None: told of no promise."""
    untold = arrivals(trace, case.loads[0] * instances, copies=case.copies, seed=repeat)
    told = with_promises(untold, case.shares, repeat)
    if weights is None:
        run = run_fleet(case, DEFAULT, untold, instances, seed=repeat)
    else:
        with weighing.in_force(weights):
            run = run_fleet(case, DEFAULT, told, instances, seed=repeat)
    span_s = told[-1].at_s - told[0].at_s
    summary = summarise(run.served, run.busy_s, case.promise, span_s)
    return weighing.Outcome(by_share(run.served, told, case.shares), summary.hit_share)


def chosen_cases(numbers: str | None, loads: str | None, *, quick: bool) -> tuple[Case, ...]:
    """The cases asked for.  Raises `ConfigError` for what is none."""
    wanted: list[int] = []
    try:
        everything = range(1, len(ALL) + 1)
        wanted = [int(number) for number in names_in(numbers)] if numbers else [*everything]
        asked = tuple(float(load) for load in names_in(loads)) if loads else ()
        cases = [ALL[number - 1] for number in wanted if number >= 1]
    except (ValueError, IndexError):
        cases, asked = [], ()
    if not cases or len(cases) != len(wanted) or any(load <= 0 for load in asked):
        raise ConfigError(
            f"--cases {numbers} --loads {loads}: give cases of 1 to {len(ALL)} and rates "
            "above 0, each list with commas"
        )
    if quick:
        plain = [case for case in cases if not case.shares]
        cases = [*plain[:1], *[case for case in cases if case.shares][:1]]
    return tuple(
        replace(case, loads=asked or (case.loads[:1] if quick else case.loads)) for case in cases
    )


def _record(name: str) -> Peer:
    if name == BLIND:
        return Peer(name=name, what=f"`{DEFAULT}`, told of no promise")
    what = PEERS[name][1] if name in PEERS else routing_policies(build_manager(""))[name].what
    return Peer(name=name, what=what)


def _details(bench: Bench, profiles: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{case}: {load:g}/s, {name}": [asdict(run) for run in runs]
        for (case, load, name), runs in bench.found.items()
    }
    found |= {
        f"{case}: {load:g}/s, {name}": [
            {share: asdict(one) for share, one in run.items()} for run in runs
        ]
        for (case, load, name), runs in bench.shares.items()
    }
    for name in sorted(profiles):
        profile = load_profile(FOLDER / "profiles" / f"{name}.json")
        fitted: Mapping[str, Any] = profile.model_dump(exclude={"points"})
        errors = [round(error, 3) for error in profile.errors()]
        found[f"profile {name}"] = {**fitted, "relative errors": errors}
    return found
