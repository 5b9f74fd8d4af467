"""Charts of the report as inline SVG: coloured by CSS variables, as wide as the page, with text that does not scale."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

COLUMNS = 240
HEAT_COLUMNS = 72
HEAT_LEVELS = 20
_PLOT_HEIGHT = 190
# The inner drawing is stretched to the plot's width; its strokes are not.
_WIDTH = 1000
# A curve that spans more than this factor gets a logarithmic axis.
_LOG_SPAN = 20

Real = int | float
Point = tuple[Real, Real | None]
_Column = tuple[Real, Real, Real, Real]  # x, mean, lowest, highest


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one line, in order of x; y is None where there is a gap. color: 1 to 4."""

    name: str
    points: Sequence[Point]
    color: int = 1


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    what: str,
    x_name: str,
    x_end: Real | None = None,
    marks: Sequence[Real] = (),
    format_y: Callable[[Real], str] | None = None,
    x_ticks: Sequence[tuple[Real, str]] | None = None,
    from_zero: bool = False,
    height: int = _PLOT_HEIGHT,
) -> str:
    """A figure of curves over one x axis that ends at x_end at least.

    what: the quantity drawn. marks: x of vertical lines. x_ticks: x and label, by default round numbers. Many points
    become the mean and the range of neighbours. Curves without a finite point give a sentence in its place.
    """
    columns = [(curve, columns_of(curve.points)) for curve in curves]
    parts = [column for _, runs in columns for run in runs for column in run]
    if not parts:
        return _figure(title, '<p class="none">Nothing to draw yet.</p>')
    axis = _Axis.of([low for _, _, low, _ in parts], [high for _, _, _, high in parts], from_zero)
    first = min(min(x for x, *_ in parts), 0.0)
    last = max(x_end or 0.0, *(x for x, *_ in parts))
    span = (last - first) or 1.0

    def at(x: Real, y: Real) -> str:
        return f"{(x - first) / span * _WIDTH:.1f} {axis.place(y) * height:.1f}"

    drawn = [_mark((x - first) / span, height) for x in marks]
    # The dashed curve comes last: where both are the same it lets the other be seen.
    for curve, runs in sorted(columns, key=lambda column: column[0].color):
        drawn += [_band(run, at, curve.color) for run in runs if any(low != high for _, _, low, high in run)]
        drawn += [_line(run, at, curve.color) for run in runs]
    show = format_y or short
    grid = [_y_tick(axis.place(value), show(value), height) for value in axis.ticks]
    labels = x_ticks if x_ticks is not None else [(x, short(x)) for x in linear_ticks(first, last, 4)]
    grid += [_x_tick((x - first) / span, label, height) for x, label in labels]
    legend = [_key(f"c{curve.color}", curve.name) for curve, runs in columns if runs and len(curves) > 1]
    legend += [_key("mark", "not finite, skipped")] if marks else []
    note = f"{what} by {x_name}{', log scale' if axis.log else ''}"
    body = _plot(title, height, "".join(grid), f"0 0 {_WIDTH} {height}", "".join(drawn))
    return _figure(title, body, note=note, legend=legend)


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[Point]]], *, what: str, x_name: str, x_end: Real) -> str:
    """A figure of one row per label, from the first at the top; colour is the value on a logarithmic scale.

    The points of a row are averaged in columns of equal width over 0 to x_end.
    """
    cells = [(label, _heat_cells(points, x_end)) for label, points in rows]
    values = [value for _, row in cells for value in row.values() if value > 0]
    if not values:
        return _figure(title, '<p class="none">Nothing to draw yet.</p>')
    low, high = math.log(min(values)), math.log(max(values))
    shapes: dict[int, list[str]] = {}
    for y, (_, row) in enumerate(cells):
        for x, value in row.items():
            share = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
            shapes.setdefault(round(share * (HEAT_LEVELS - 1)), []).append(f"M{x} {y}h1v1h-1z")
    paths = "".join(f'<path class="h{level}" d="{"".join(d)}"/>' for level, d in sorted(shapes.items()))
    note = f"{what} by {x_name}, colours on a log scale"
    titles = "".join(_row_title(y, label, row) for y, (label, row) in enumerate(cells))
    height = heat_height(len(cells))
    labels = "".join(
        _y_tick((y + 0.5) / len(cells), label, height, line=False)
        for y, (label, _) in enumerate(cells)
        if y % -(-len(cells) // (height // 14)) == 0
    )
    ticks = "".join(_x_tick(value / x_end, short(value), height) for value in linear_ticks(0.0, x_end, 4))
    empty = f'<rect class="empty" width="{HEAT_COLUMNS}" height="{len(cells)}"/>'
    body = _plot(title, height, labels + ticks, f"0 0 {HEAT_COLUMNS} {len(cells)}", empty + paths + titles)
    steps = "".join(f'<rect class="h{i}" x="{i}" width="1" height="1"/>' for i in range(HEAT_LEVELS))
    scale = (
        f'{short(min(values))} <svg class="scale" viewBox="0 0 {HEAT_LEVELS} 1" preserveAspectRatio="none">'
        f"{steps}</svg> {short(max(values))}"
    )
    return _figure(title, body, note=note, legend=[scale])


def heat_height(rows: int) -> int:
    """Of a heat map's plot, in pixels."""
    return max(_PLOT_HEIGHT, 4 * rows)


def columns_of(points: Sequence[Point]) -> list[list[_Column]]:
    """The points as runs of at most COLUMNS columns in all; a run ends at a gap."""
    size = -(-len(points) // COLUMNS) or 1
    runs: list[list[_Column]] = [[]]
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start : start + size] if y is not None and math.isfinite(y)]
        if not part:
            runs.append([])
            continue
        ys = [y for _, y in part]
        runs[-1].append((part[-1][0], sum(ys) / len(ys), min(ys), max(ys)))
    return [run for run in runs if run]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A vertical axis: place(value) is 0 at the top and 1 at the bottom."""

    low: Real
    high: Real
    log: bool
    ticks: tuple[Real, ...]

    @classmethod
    def of(cls, lows: Sequence[Real], highs: Sequence[Real], from_zero: bool) -> "_Axis":
        low, high = (0.0 if from_zero else min(lows)), max(highs)
        if low > 0 and high / low > _LOG_SPAN:
            low, high = low / 1.15, high * 1.15
            return cls(low, high, True, tuple(_log_ticks(low, high)))
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = (0.0 if from_zero and low >= 0 else low - margin), high + margin
        return cls(low, high, False, tuple(linear_ticks(low, high, 5)))

    def place(self, value: Real) -> float:
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (high - value) / (high - low)


def linear_ticks(low: Real, high: Real, count: int) -> list[Real]:
    """About `count` round numbers within low and high."""
    rough = (high - low) / count
    if rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: Real, high: Real) -> list[float]:
    """Powers of ten within low and high; with 2 and 5 times them where those alone would be few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 3) if math.log10(high / low) > 2 else (1, 2, 5)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in values if low <= value <= high]


def short(value: Real) -> str:
    """A number in few characters: 1.2M, 350K, 0.25, 3e-4."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _heat_cells(points: Sequence[Point], x_end: Real) -> dict[int, Real]:
    """Column -> mean of the points in it; a column between two points takes the later one's value."""
    sums: dict[int, list[Real]] = {}
    for x, y in points:
        if y is not None and math.isfinite(y):
            column = min(max(math.ceil(x / x_end * HEAT_COLUMNS) - 1, 0), HEAT_COLUMNS - 1)
            sums.setdefault(column, []).append(y)
    filled: dict[int, Real] = {}
    for column in reversed(range(max(sums, default=-1) + 1)):
        group = sums.get(column)
        filled[column] = sum(group) / len(group) if group else filled[column + 1]
    return filled


def _row_title(y: int, label: str, row: dict[int, Real]) -> str:
    if not row:
        return ""
    text = f"layer {label}: {short(row[min(row)])} first, {short(row[max(row)])} now"
    return f'<rect class="over" y="{y}" width="{HEAT_COLUMNS}" height="1"><title>{escape(text)}</title></rect>'


def _line(run: Iterable[_Column], at: Callable[[Real, Real], str], color: int) -> str:
    places = [at(x, mean) for x, mean, _, _ in run]
    # A lone point has no length; the round cap of a line of none draws it.
    return f'<path class="line c{color}" d="M{"L".join(places)}{"h0" if len(places) == 1 else ""}"/>'


def _band(run: Sequence[_Column], at: Callable[[Real, Real], str], color: int) -> str:
    edge = [at(x, high) for x, _, _, high in run] + [at(x, low) for x, _, low, _ in reversed(run)]
    return f'<path class="band c{color}" d="M{"L".join(edge)}z"/>'


def _mark(share: Real, height: int) -> str:
    return f'<path class="line mark" d="M{share * _WIDTH:.1f} 0v{height}"/>'


def _y_tick(share: Real, text: str, height: int, *, line: bool = True) -> str:
    y = share * height
    rule = f'<line x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>' if line else ""
    return f'{rule}<text class="y" x="-8" y="{y + 4:.1f}">{escape(text)}</text>'


def _x_tick(share: Real, text: str, height: int) -> str:
    side = "first" if share < 0.02 else "last" if share > 0.97 else "middle"
    return f'<text class="x {side}" x="{100 * share:.2f}%" y="{height + 18}">{escape(text)}</text>'


def _key(kind: str, name: str) -> str:
    return f'<i class="key {kind}"></i>{escape(name)}'


def _plot(title: str, height: int, axes: str, box: str, drawn: str) -> str:
    """Axes in pixels and percent, and inside them a drawing in the coordinates of `box`, stretched to fit."""
    return (
        f'<div class="plot"><svg role="img" aria-label="{escape(title)}" width="100%" height="{height}">{axes}'
        f'<svg width="100%" height="{height}" viewBox="{box}" preserveAspectRatio="none">{drawn}</svg></svg></div>'
    )


def _figure(title: str, body: str, *, note: str = "", legend: Sequence[str] = ()) -> str:
    keys = "".join(f"<span>{key}</span>" for key in legend)
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="note">{escape(note)}</span></figcaption>{body}'
        + (f'<div class="legend">{keys}</div>' if keys else "")
        + "</figure>"
    )
