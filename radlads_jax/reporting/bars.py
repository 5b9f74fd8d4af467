"""Bars of every layer's figures as an SVG file of its own, for a choice of softmax layers."""

import html
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TITLE = 16, 140, 12, 34
_LEAST_WIDTH, _LINE, _LETTER = 320, 12, 5
_COLORS = {True: "#c2410c", False: "#64748b"}


def layers_picture(lines: Sequence[Mapping[str, Any]], kept: Collection[int], note: str = "") -> str:
    """A bar for each layer's "kl", and below for its "nll", those of the kept layers in another colour.

    note: what has to be known of the figures, in words; it stands below them.
    """
    panels = (("kl", "KL on text, this layer alone swapped"), ("nll", "change of the answers' NLL"))
    width, bottom = max(2 * _LEFT + _WIDTH * len(lines), _LEAST_WIDTH), len(panels) * (_HEIGHT + _TITLE) + 14
    said = _note(note, width, bottom)
    height = bottom + 10 + _LINE * len(said)
    drawn = [part for i, (name, title) in enumerate(panels) for part in _panel(lines, kept, name, title, i)]
    numbers = [
        f'<text x="{_LEFT + _WIDTH * (i + 0.5):.1f}" y="{bottom}" text-anchor="middle">{line["layer"]}</text>'
        for i, line in enumerate(lines)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="9" role="img" aria-label="softmax layers">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join([*drawn, *numbers, *said])}</svg>\n'
    )


def _note(note: str, width: int, top: int) -> list[str]:
    rows = textwrap.wrap(note, (width - 2 * _LEFT) // _LETTER)
    return [
        f'<text x="{_LEFT}" y="{top + _LINE * i}" fill="{_COLORS[True]}">{html.escape(row)}</text>'
        for i, row in enumerate(rows, 1)
    ]


def _panel(lines: Sequence[Mapping[str, Any]], kept: Collection[int], name: str, title: str, place: int) -> list[str]:
    top = place * (_HEIGHT + _TITLE) + _TITLE
    values = [line[name] for line in lines]
    high, low = max(0.0, *values), min(0.0, *values)
    scale = _HEIGHT / ((high - low) or 1.0)
    zero = top + high * scale
    parts = [f'<text x="{_LEFT}" y="{top - 10}" font-size="12">{title} (most: {max(values):.3g})</text>']
    for i, (line, value) in enumerate(zip(lines, values, strict=True)):
        x, y = _LEFT + _WIDTH * i + 2, zero - max(value, 0.0) * scale
        bar = f'<rect x="{x}" y="{y:.1f}" width="{_WIDTH - 4}" height="{abs(value) * scale:.1f}"'
        parts.append(f'{bar} fill="{_COLORS[line["layer"] in kept]}"/>')
    return [*parts, f'<path d="M{_LEFT} {zero:.1f}h{_WIDTH * len(lines)}" stroke="#000" stroke-width="0.5"/>']
