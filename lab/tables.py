"""From the recorded scores to tables: means over seeds, paired differences, intervals, Markdown, HTML, bars.

All differences are paired by seed. Three seeds give poor intervals, so `smallest_difference` pools the variance of all
rows of a group: differences below it are inconclusive. One row in twenty would pass it by chance."""

import html
import json
import statistics
from pathlib import Path

from lab import groups

RESULTS = Path(__file__).parent / "results.jsonl"
T2I = "best.pt, text to image"
EXCLUDED = "best.pt, text to image, excluding the source image"
COLUMNS = {"R@1": (T2I, "R@1"), "mAP": (T2I, "mAP"), "mAP, source image excluded": (EXCLUDED, "mAP")}
TEACHER = "held-out view: teacher"                                      # a score that only runs of a teacher have


def recorded():
    """{command: test scores} of all runs that were ever made; of a repeated command the last."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {run["command"]: run["test"] for run in map(json.loads, lines)}


# ---- statistics ------------------------------------------------------------------------------------------------------


def mean_std(values):
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def t_quantile(df):
    """The 97.5 % quantile of Student's t distribution (for df >= 5 by the series of Cornish and Fisher)."""
    z = 1.96
    table = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
    return table.get(df) or z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2)


def difference(pairs):
    """The mean of paired differences and half of its 95 % interval, as text."""
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f}" if pairs else ""
    half = t_quantile(len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.mean(pairs):+.1f} ± {half:.1f}"


def smallest_difference(rows):
    """The smallest mean difference significant at 5 %. rows: lists of paired differences; their variance is pooled.

    None if no row has two seeds."""
    rows = [pairs for pairs in rows if len(pairs) > 1]
    if not rows:
        return None
    df = sum(len(pairs) - 1 for pairs in rows)
    variance = sum(statistics.variance(pairs) * (len(pairs) - 1) for pairs in rows) / df
    return t_quantile(df) * variance ** 0.5 / statistics.median(map(len, rows)) ** 0.5


def same_direction(pairs, published, smallest):
    """Whether our differences have the sign of the published one: yes, no, or inconclusive."""
    if len(pairs) < 2:
        return ""
    found = statistics.mean(pairs)
    if abs(found) <= smallest:
        return "inconclusive"
    return "yes" if found * published > 0 else "no"


# ---- the runs of a group ---------------------------------------------------------------------------------------------


class Runs:
    """The recorded scores of a group: {row: {seed: {what: {metric: value}}}}."""

    def __init__(self, group, seeds):
        known = recorded()
        self.group, self.seeds = group, groups.SEEDS.get(group, seeds)
        self.scores = {}
        for name in groups.GROUPS[group][1]:
            commands = {seed: groups.command(group, name, seed) for seed in range(self.seeds)}
            self.scores[groups.row(name)] = {seed: known[line] for seed, line in commands.items() if line in known}
        self.teachers = [row for row, runs in self.scores.items() if any(TEACHER in run for run in runs.values())]
        self.names = [name for name in groups.GROUPS[group][1]
                      if self.scores[groups.row(name)] and groups.row(name) not in self.teachers]

    def values(self, row, what, metric):
        """{seed: value}"""
        return {seed: run[what][metric] for seed, run in self.scores[row].items() if metric in run.get(what, {})}

    def paired(self, row, base, what, metric):
        """Differences between two rows, for the seeds that both have."""
        ours, theirs = self.values(row, what, metric), self.values(base, what, metric)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def columns(self):
        """The columns of which there are scores; the source image is excluded only for LCR2S, whose point it is."""
        found = {}
        for column, (what, metric) in COLUMNS.items():
            if what == EXCLUDED and not self.group.startswith("lcr2s"):
                continue
            if any(self.values(groups.row(name), what, metric) for name in self.names):
                found[column] = what, metric
        return found

    def smallest_differences(self):
        """{column: smallest significant difference}, from the differences to the first row of comparison."""
        compared = [name for name in self.names if groups.bases(name)]
        return {column: smallest_difference([self.paired(groups.row(name), groups.bases(name)[0], what, metric)
                                             for name in compared])
                for column, (what, metric) in self.columns().items()}


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(rows):
    """A table of cells as Markdown; the first row is the head."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def table(group, seeds):
    """Markdown: per row the mean and standard deviation over seeds, then the paired difference and its 95 % interval.

    Where a paper publishes a difference of R@1, it is quoted. We compare its sign with that of our mAP, whose noise is
    half that of R@1. Teachers of LCR2S have a table of their own."""
    runs = Runs(group, seeds)
    columns, smallest = runs.columns(), runs.smallest_differences()
    published = groups.PUBLISHED.get(group, {})
    head = [""] + [cell for column in columns for cell in (column, "difference")]
    if published:
        head += ["published, R@1", "same direction (mAP)?"]
    rows = [head]
    for name in runs.names:
        rows += rows_of(runs, name, columns, published, smallest)
    text = markdown(rows)
    if any(smallest.values()):
        number = max(len(found) for found in runs.scores.values())
        text += (f"\n\n`{group}`, {number} seeds; smallest difference significant at 5 % (pooled variance): " +
                 ", ".join(f"{value:.1f} {column}" for column, value in smallest.items() if value) + ".")
    return text + ("\n\n" + teacher_table(runs) if runs.teachers else "")


def rows_of(runs, name, columns, published, smallest):
    """A line per row that this one is compared with; the means stand in the first."""
    row, bases = groups.row(name), groups.bases(name)
    number = len(runs.scores[row])
    label = row + (f", {number} seed{'s' * (number > 1)}" if number < runs.seeds else "")
    lines = []
    for n, base in enumerate(bases or [None]):
        cells = [(label if n == 0 else "") + (f" (over {base})" if base else "")]
        for what, metric in columns.values():
            cells.append(mean_std(runs.values(row, what, metric).values()) if n == 0 else "")
            cells.append(difference(runs.paired(row, base, what, metric)) if base else "")
        if published and n == 0 and row in published:
            verdict = same_direction(runs.paired(row, base, T2I, "mAP"), published[row], smallest["mAP"])
            cells += [f"{published[row]:+.2f}", verdict]
        elif published:
            cells += ["", ""]
        lines.append(cells)
    return lines


def teacher_table(runs):
    """Markdown: R@1 and mAP of each score of `distill.evaluate_teacher`, a column per teacher."""
    rows = [[f"{runs.group}: R@1, mAP", *runs.teachers]]
    for what in next(iter(runs.scores[runs.teachers[0]].values())):
        rows.append([what] + [", ".join(mean_std(runs.values(row, what, metric).values()) for metric in ("R@1", "mAP"))
                              for row in runs.teachers])
    return markdown(rows)


# ---- the page --------------------------------------------------------------------------------------------------------


def as_html(text):
    """Markdown tables, and the lines between them, as HTML."""
    out, in_table = [], False
    for line in text.splitlines():
        if line.startswith("|---") or not line:
            continue
        if line.startswith("|") != in_table:
            in_table = not in_table
            out.append("<table>" if in_table else "</table>")
        if in_table:
            cells = (html.escape(cell.strip()).replace(" ± ", "&nbsp;±&nbsp;") for cell in line[1:-1].split("|"))
            out.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        else:
            out.append(f"<p>{html.escape(line.replace('`', ''))}</p>")
    return "".join(out) + ("</table>" if in_table else "")


def bars(group, seeds):
    """The means of a group (R@1, or mAP if R@1 is missing) as the bars of an SVG, with their standard deviations."""
    runs = Runs(group, seeds)
    scores = {}
    for metric in ("mAP", "R@1"):                                       # R@1 is preferred, so it comes last
        found = {row: list(runs.values(row, T2I, metric).values()) for row in runs.scores}
        if any(found.values()):
            scores, name = {row: values for row, values in found.items() if values}, metric
    if not scores:
        return ""
    low, high = max(0, min(map(min, scores.values())) - 2), max(map(max, scores.values()))

    def at(value):
        return 260 + 480 * (value - low) / (high - low)

    shapes = []
    for n, (row, values) in enumerate(scores.items()):
        middle, y = statistics.mean(values), 22 * n + 11
        side = statistics.stdev(values) if len(values) > 1 else 0
        shapes += [
            f'<text x="252" y="{y + 4}" text-anchor="end">{html.escape(row)}</text>',
            f'<rect x="260" y="{y - 8}" width="{at(middle) - 260:.1f}" height="16" fill="#9bbfe0"/>',
            f'<path d="M{at(middle - side):.1f},{y}H{at(middle + side):.1f}" stroke="#222" stroke-width="2"/>',
            f'<text x="{at(middle + side) + 8:.1f}" y="{y + 4}">{mean_std(values)}</text>',
        ]
    legend = (f"{name}, %. Bars begin at {low:.0f}. A line is a standard deviation over seeds to both sides. "
              "Rows share most of it, so compare the paired differences.")
    svg = f'<svg width="900" height="{22 * len(scores)}" role="img" aria-label="{name} of each row, in percent">'
    return f"{svg}{''.join(shapes)}</svg><p>{legend}</p>"
