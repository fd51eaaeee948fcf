"""A picture of where a token's time goes: the launches in time, and below them the kernels' shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nitinol.commands.rows import Limits, Phase, Row, shorten
from nitinol.models.memory import gigabytes

WIDTH, MARGIN, BAR, STEP = 960, 40, 24, 42
# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008), then greys.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F", "#BFBFBF")


@dataclass(frozen=True)
class Share:
    """All launches of one kernel from one line of the model."""

    title: str
    source: str
    launches: int
    time_us: float
    bytes: int
    operations: int


def shares(rows: Sequence[Row]) -> list[Share]:
    """By source line and kernel, the longest first; what does not fit the picture becomes "others"."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.line, row.kernel), []).append(row)
    everything = sorted(
        (Share(f"{line}  {kernel.removesuffix('_kernel')}", group[0].operation, len(group),
               sum(r.time_us for r in group), sum(r.bytes for r in group), sum(r.operations for r in group))
         for (line, kernel), group in found.items()), key=lambda share: -share.time_us)
    most = len(COLOURS) - 1
    kept, rest = everything[:most], everything[most:]
    if rest:
        kept.append(Share(f"{len(rest)} others", "", sum(s.launches for s in rest), sum(s.time_us for s in rest),
                          sum(s.bytes for s in rest), sum(s.operations for s in rest)))
    return kept


def draw(phase: Phase, limits: Limits, model: str, machine: str) -> str:
    """The decode step as an SVG document."""
    found = shares(phase.rows)
    colours = {share.title: colour for share, colour in zip(found, COLOURS)}
    end = max((row.start_us + row.time_us for row in phase.rows), default=1.0)
    busy = sum(share.time_us for share in found) or 1.0
    inner = WIDTH - 2 * MARGIN
    top = 176
    height = top + STEP * len(found) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(MARGIN, 38, f"Where a token's time goes: {model}", size=19, weight="600"),
        _text(MARGIN, 62, f"{phase.wall_us / 1e3:.2f} ms for one token, {len(phase.rows)} kernel launches in one "
                          f"submission; {machine}", colour="#666"),
    ]
    for row in phase.rows:
        title = f"{row.line}  {row.kernel.removesuffix('_kernel')}"
        x, width = MARGIN + inner * row.start_us / end, inner * row.time_us / end
        parts.append(f'<rect x="{x:.2f}" y="84" width="{max(width, 0.3):.2f}" height="36" '
                     f'fill="{colours.get(title, COLOURS[len(found) - 1])}"><title>{escape(title)}: '
                     f'{row.time_us:.1f} us</title></rect>')
    for tick in range(5):
        x = MARGIN + inner * tick / 4
        anchor = ("start", "middle", "middle", "middle", "end")[tick]
        parts.append(f'<line x1="{x:.1f}" y1="120" x2="{x:.1f}" y2="126" stroke="#999"/>')
        parts.append(_text(x, 140, f"{end * tick / 4 / 1e3:.2f} ms", anchor=anchor, colour="#666", size=11))
    longest = found[0].time_us if found else 1.0
    left, room = MARGIN + 280, inner - 280 - 230
    for i, share in enumerate(found):
        y = top + STEP * i
        width = room * share.time_us / longest
        rate = share.bytes / share.time_us / 1e3 if share.time_us else 0.0
        parts.append(_text(MARGIN, y + 11, share.title))
        parts.append(_text(MARGIN, y + 25, shorten(share.source, 46), size=10, colour="#777"))
        parts.append(f'<rect x="{left}" y="{y}" width="{max(width, 1):.1f}" height="{BAR}" rx="2" '
                     f'fill="{COLOURS[i]}"/>')
        figures = (f"{100 * share.time_us / busy:.0f}%  {share.time_us / 1e3:.2f} ms  {share.launches}×  "
                   f"{rate:.1f} GB/s")
        parts.append(_text(left + width + 8, y + 16, figures, colour="#444"))
    rate = phase.bytes / phase.wall_us / 1e3
    parts.append(_text(MARGIN, height - 24,
                       f"{gigabytes(phase.bytes)} read and written at {rate:.1f} GB/s: "
                       f"{100 * rate / limits.bandwidth_gb_s:.0f}% of the {limits.bandwidth_gb_s:.1f} GB/s that this "
                       "machine was measured to read.", colour="#444"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, size: int = 13, weight: str = "400", colour: str = "#222",
          anchor: str = "start") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
            f'text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>')
