"""Tables for a person to read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .rows import BASE, FROZEN, LOOPS, OURS, UNSTEADY, Row, geomean, is_peer
from .targets import evaluate

LONG_TEXTS = ("work", "at its least", "kernels")
TEXTS = ("device", "dtype", "mode", "options", "arm", "verdict", *LONG_TEXTS)
SIZES = ("T", "B", "I", "H", "P", "layers", "directions")
CASE_COLUMNS = ("work", "device", "dtype", "mode", "options", *SIZES, "busy", "threads")
HEADINGS = {"layers": "L", "directions": "D", "threads": "thr"}
WIDTH = 80


def make_console() -> Console:
    """As wide as the terminal; elsewhere lines of text are not broken."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)


def show(console: Console, table: Table, width: int = WIDTH) -> None:
    """Prints it, so many columns wide if it can be, without blanks at the ends of its lines."""
    table.min_width = min(
        width, max(map(len, str(table.title).splitlines()))
    )  # or a narrow table would break its title
    measured = console.measure(table)
    least = measured.minimum if any(column.header in LONG_TEXTS for column in table.columns) else measured.maximum
    with console.capture() as capture:
        console.print(table, width=max(width, least) if not console.is_terminal else None)
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def new_table(title: str, *names: str) -> Table:
    """Columns of numbers, but for TEXTS; where the terminal is narrow, the long texts give way."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in names:
        justify = "left" if name in TEXTS else "right"
        table.add_column(HEADINGS.get(name, name), justify=justify, no_wrap=name not in LONG_TEXTS)
    return table


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, "–" for none."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def coloured(text: str, good: bool) -> str:
    return f"[{'green' if good else 'red'}]{text}[/]"


def case_columns(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What all rows have in common, as text, and the names of the axes on which they differ."""
    values = {name: {getattr(row.case, name) for row in rows} for name in CASE_COLUMNS}
    shown = [name for name in CASE_COLUMNS if len(values[name]) > 1]
    unremarkable = {"work": {""}, "options": {""}, "P": {0}, "busy": {0}, "layers": {1}, "directions": {1}}
    constant = [
        f"{name} {next(iter(values[name]))}"
        for name in CASE_COLUMNS
        if name not in shown and values[name] != unremarkable.get(name)
    ]
    if "I" in shown and all(row.case.I == row.case.H for row in rows):
        shown.remove("I")
        constant.append("I = H")
    return ", ".join(constant), shown


def case_cells(row: Row, shown: Iterable[str]) -> list[str]:
    return [str(getattr(row.case, name)) for name in shown]


def time_of(row: Row, arm: str) -> str:
    """µs, with a mark where they say little."""
    if arm in row.errors:
        return "[red]error[/]"
    return number(row.us.get(arm)) + ("?" if arm in row.us and row.unsteady(arm) else "")


def by_mode(rows: Sequence[Row]) -> list[tuple[Row, bool]]:
    """The rows by mode, each with whether it is the last one of its mode."""
    ordered = sorted(rows, key=lambda row: row.case.mode)
    following = [row.case.mode for row in ordered[1:]] + [""]
    return [(row, row.case.mode != mode) for row, mode in zip(ordered, following, strict=True)]


def results(rows: Sequence[Row]) -> Table:
    """Our times and torch's, what a step takes of ours, torch's time over ours, and the floor over ours."""
    title, shown = case_columns(rows)
    arms = [arm for arm in (OURS, BASE) if any(arm in {**row.us, **row.errors} for row in rows)]
    title += f"\nµs of each, µs/step of {OURS}, ratio = {BASE} / {OURS}, floor / {OURS}"
    table = new_table(title, *shown, *arms, "µs/step", "ratio", "floor")
    for row, last_of_mode in by_mode(rows):
        ratio, share = row.ratio, row.floor_share
        mark = "?" if ratio is not None and (row.unsteady(OURS) or row.unsteady(BASE)) else ""
        table.add_row(
            *case_cells(row, shown),
            *(time_of(row, arm) for arm in arms),
            number(row.us[OURS] / row.case.T if OURS in row.us else None),
            "–" if ratio is None else coloured(f"{ratio:.2f}{mark}", ratio >= 1),
            "–" if share is None else f"{share:.0%}",
            end_section=last_of_mode,
        )
    return table


def peers(rows: Sequence[Row]) -> Table | None:
    """The times of all others; None if there are none."""
    title, shown = case_columns(rows)
    arms = [arm for arm in dict.fromkeys(arm for row in rows for arm in (*row.us, *row.errors)) if arm != OURS]
    if not set(arms) - {BASE}:
        return None
    table = new_table(f"{title}\nµs of the others", *shown, *(arm for arm in arms if arm != BASE))
    for row, last_of_mode in by_mode(rows):
        times = (time_of(row, arm) for arm in arms if arm != BASE)
        table.add_row(*case_cells(row, shown), *times, end_section=last_of_mode)
    return table


def geomeans(rows: Iterable[Row]) -> Table:
    """Each arm's time over ours, as a geometric mean over the rows that have both."""
    names = ("mode", "threads", "arm", "rows", "geomean", "least")
    table = new_table(f"Times over those of {OURS}", *names)
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in (row for row in rows if not row.case.busy):
        for arm, us in row.us.items():
            if arm != OURS and OURS in row.us:
                for mode, threads in ((row.case.mode, str(row.case.threads)), ("all", "all")):
                    groups.setdefault((mode, threads, arm), []).append(us / row.us[OURS])
    for key, ratios in sorted(groups.items(), key=lambda item: (item[0][0] == "all", item[0])):
        mean, least = geomean(ratios), min(ratios)
        table.add_row(*key, str(len(ratios)), coloured(f"{mean:.2f}", mean >= 1), coloured(f"{least:.2f}", least >= 1))
    return table


def targets(rows: Iterable[Row]) -> Table | None:
    """What is required of the suites, and what their rows reached; None if no row says anything about it."""
    names = ("work", "rows", "geomean", "required", "least", "required", "stretch", "met", "at its least")
    table = new_table(f"Targets ({BASE} / {OURS} unless said)", *names)
    outcomes = evaluate(rows)
    for outcome in outcomes:
        target, (row, least) = outcome.target, outcome.worst
        figures = [f"{outcome.mean:.2f}", number(target.mean), f"{least:.2f}", number(target.minimum)]
        met = coloured("yes" if outcome.met else "no", outcome.met)
        count = str(len(outcome.figures))
        table.add_row(target.work, count, *figures, number(target.stretch), met, str(row.case))
    return table if outcomes else None


def ceilings(measured: dict[str, Any]) -> Table:
    """What the machine can do."""
    first = next(iter(measured.values()))
    speeds = [f"{dtype}\nGFLOP/s" for dtype in first["fma_gflops"]]
    bandwidths = [f"{level['name']}\nGB/s" for level in first["levels"]]
    title = "Ceilings of this machine (bandwidths of each thread)"
    table = new_table(title, "threads", *speeds, *bandwidths, "barrier\nµs")
    for threads, own in measured.items():
        figures = [*own["fma_gflops"].values(), *(level["read_gbs"] for level in own["levels"])]
        table.add_row(threads, *map(number, figures), number(own["barrier_us"] or None))
    return table


def strategies(rows: Sequence[Row]) -> Table | None:
    """What the cost model says of each strategy, and what is; None if no row has plans."""
    rows = [row for row in rows if row.plans]
    if not rows:
        return None
    title, shown = case_columns(rows)
    arms = [arm for arm in dict.fromkeys(arm for row in rows for arm in (*row.plans, *row.errors)) if arm != OURS]
    title += "\nµs a step, measured / predicted; * is what the planner takes; green is the fastest"
    table = new_table(title, *shown, *(arm.removeprefix(f"{OURS}-") for arm in arms))
    for row, last_of_mode in by_mode(rows):
        planned = row.plans.get(OURS, {}).get("strategy")
        fastest = min((row.us[arm] for arm in arms if arm in row.us), default=None)
        cells = []
        for arm in arms:
            plan, us = row.plans.get(arm), row.us.get(arm)
            if plan is None or us is None:
                cells.append("[red]error[/]" if arm in row.errors else "–")
                continue
            text = f"{number(us / row.case.T)} / {number(plan['microseconds_per_step'])}"
            text += "*" if plan["strategy"] == planned else " "
            cells.append(f"[green]{text}[/]" if us == fastest else text)
        table.add_row(*case_cells(row, shown), *cells, end_section=last_of_mode)
    return table


def deviations(rows: Sequence[Row]) -> Table | None:
    """How far each arm is from float64; None if that was not recorded."""
    rows = [row for row in rows if row.deviations]
    if not rows:
        return None
    title, shown = case_columns(rows)
    title += "\n‖error‖ / ‖exact‖ of outputs, and of gradients; the largest of their arrays"
    table = new_table(title, *shown, *(arms := list(dict.fromkeys(arm for row in rows for arm in row.deviations))))
    for row, last_of_mode in by_mode(rows):
        own = (row.deviations.get(arm, {}) for arm in arms)
        cells = (" ".join(f"{value:.1e}" for value in each.values()) or "–" for each in own)
        table.add_row(*case_cells(row, shown), *cells, end_section=last_of_mode)
    return table


def frozen(rows: Sequence[Row]) -> Table | None:
    """Times over those of our frozen layers, and over those with smaller weights; None if none was measured."""
    rows = [row for row in rows if FROZEN in row.us]
    if not rows:
        return None
    title, shown = case_columns(rows)
    arms = [arm for arm in dict.fromkeys(arm for row in rows for arm in row.us) if arm != FROZEN]
    table = new_table(
        f"{title}\nµs of {FROZEN}, and the times of the others over it", *shown, FROZEN, "best peer", *arms
    )
    for row, last_of_mode in by_mode(rows):
        own = row.us[FROZEN]
        peers = [us for arm, us in row.us.items() if is_peer(arm)]
        cells = [number(own), f"{min(peers) / own:.2f}" if peers else "–"]
        cells += [f"{row.us[arm] / own:.2f}" if arm in row.us else "–" for arm in arms]
        table.add_row(*case_cells(row, shown), *cells, end_section=last_of_mode)
    return table


def options(rows: Sequence[Row]) -> Table | None:
    """What each option costs over the plain layer, and loops in torch over ours; None if none was measured."""
    plain = {row.case: row.us[OURS] for row in rows if not row.case.options and OURS in row.us}
    groups: dict[tuple[str, str, str], list[list[float]]] = {}
    for row in (row for row in rows if row.case.options and OURS in row.us):
        own, key = row.us[OURS], (row.case.options, row.case.mode, str(row.case.threads))
        alone = plain.get(replace(row.case, options=""))
        figures = [own / alone if alone else None, *(row.us[arm] / own if arm in row.us else None for arm in LOOPS)]
        for column, figure in zip(groups.setdefault(key, [[] for _ in figures]), figures, strict=True):
            column += [] if figure is None else [figure]
    if not groups:
        return None
    title = f"Times of options over the plain layer's, and of loops in torch over {OURS}'s: geomean (worst)"
    table = new_table(title, "options", "mode", "threads", "over plain", *(arm.replace("torch-", "") for arm in LOOPS))
    for key, columns in groups.items():
        spans = (
            f"{geomean(column):.2f} ({worst(column):.2f})" if column else "–"
            for column, worst in zip(columns, (max, min, min), strict=True)
        )
        table.add_row(*key, *spans)
    return table


def latencies(rows: Sequence[Row]) -> Table | None:
    """What so many percent of the calls take at most; None if none were timed one by one."""
    rows = [row for row in rows if row.latency]
    if not rows:
        return None
    title, shown = case_columns(rows)
    percents = list(next(iter(rows[0].latency.values())))
    names = [f"{percent} %" for percent in percents]
    table = new_table(f"{title}\nµs that so many of the calls take at most", *shown, "arm", *names)
    for row in rows:
        for n, (arm, taken) in enumerate(row.latency.items()):
            last = n == len(row.latency) - 1
            cells = [number(taken[percent]) for percent in percents]
            table.add_row(*case_cells(row, shown), arm, *cells, end_section=last)
    return table


def short_name(kernel: str) -> str:
    """A kernel's name without its result, namespaces, arguments of templates and parameters."""
    words = re.sub(r"<.*|\(.*", "", kernel.replace("(anonymous namespace)::", "")).split()
    return words[-1].split("::")[-1] if words else kernel


def kernels(rows: Sequence[Row]) -> Table | None:
    """Which kernels ran in one call, those that take longest first; None if none were recorded."""
    rows = [row for row in rows if any(row.kernels.values())]
    if not rows:
        return None
    title, shown = case_columns(rows)
    table = new_table(f"{title}\nlaunches × kernel in one call", *shown, "arm", "kernels")
    for row in rows:
        for arm, ran in row.kernels.items():
            text = ", ".join(f"{count} × {short_name(name)}" for name, count in ran.items())
            table.add_row(*case_cells(row, shown), arm, escape(text))
    return table


def notes(console: Console, rows: Iterable[Row]) -> None:
    """What was left out and why, and what was wrong."""
    rows = list(rows)
    times = [row.unsteady(arm) for row in rows for arm in row.us]
    if any(times):
        text = f"as unsteady: quartiles over {UNSTEADY:.0%} of the median apart."
        console.print(f"? marks {sum(times)} of {len(times)} times {text}", style="yellow", markup=False)
    skipped = Counter((arm, reason) for row in rows for arm, reason in row.skipped.items())
    for (arm, reason), count in skipped.items():
        console.print(f"{arm} left out of {count} of {len(rows)} rows: {reason}", style="dim", markup=False)
    for row in rows:
        if row.error:
            console.print(f"{row.case}: {row.error}", style="red", markup=False)
