"""Groups of horizontal bars as SVG.  Knows nothing about what they measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
LEFT = 210  # where bars begin
RIGHT = 150  # room for the value behind the longest bar
BAR = 16
GROUP_GAP = 34
TOP = 56
COLOURS = ("#9aa5b1", "#c5ccd3", "#1f6feb")
TARGET_COLOUR = "#d1242f"


@dataclass(frozen=True)
class Bar:
    name: str
    length: float  # in units of the axis, 1 is the reference line
    text: str  # shown behind it


@dataclass(frozen=True)
class Group:
    title: str
    bars: tuple[Bar, ...]
    target: float  # marked across the group


def draw(groups: Sequence[Group], footer: str) -> str:
    """A whole SVG file; readable on light and dark pages."""
    longest = max((max(group.target, *(bar.length for bar in group.bars)) for group in groups), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / longest
    shapes, y = [], float(TOP)
    for group in groups:
        shapes += _group(group, y, scale)
        y += BAR * len(group.bars) + GROUP_GAP
    height = round(y + 20)
    title = "Speed relative to the best peer (longer is better); red: target"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="sans-serif" font-size="12" role="img">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            _text(16, 24, title, size=15, weight="bold"),
            _line(LEFT + scale, TOP - 14, y - GROUP_GAP + 6, 'stroke="#57606a" stroke-dasharray="3 3"'),
            *shapes,
            _text(16, height - 12, footer, size=10, colour="#57606a"),
            "</svg>\n",
        ]
    )


def _group(group: Group, top: float, scale: float) -> list[str]:
    shapes = [_text(16, top - 6, group.title, weight="bold")]
    for position, bar in enumerate(group.bars):
        y, length = top + position * BAR, bar.length * scale
        colour = COLOURS[-1] if bar is group.bars[-1] else COLOURS[min(position, len(COLOURS) - 2)]
        shapes.append(_text(LEFT - 8, y + 12, bar.name, anchor="end"))
        shapes.append(
            f'<rect x="{LEFT}" y="{y + 2:.1f}" width="{length:.1f}" height="{BAR - 4}" fill="{colour}"/>'
        )
        shapes.append(_text(LEFT + length + 6, y + 12, f"{bar.text}  ({bar.length:.2f})", size=11))
    bottom = top + BAR * len(group.bars)
    shapes.append(
        _line(LEFT + group.target * scale, top, bottom, f'stroke="{TARGET_COLOUR}" stroke-width="2"')
    )
    return shapes


def _line(x: float, top: float, bottom: float, style: str) -> str:
    return f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" {style}/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    colour: str = "#1f2328",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
