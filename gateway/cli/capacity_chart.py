"""The comparison that `sliceway capacity` draws: ways to buy, what each costs, and for whom. As values, and as SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from placement.capacity import Capacity, Purchase, costs_of_demands

_PALETTE = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
)
_LEFT, _WIDTH, _ROW, _BAR, _TOP, _LEGEND = 250, 520, 34, 22, 46, 20
_LABEL_LENGTH = 38


@dataclass(frozen=True, slots=True)
class Bar:
    """One way to buy: cost per hour (or cards, without prices) by model. `note` says what is wrong with it."""

    label: str
    parts: tuple[tuple[str, float], ...]
    best: bool = False
    note: str = ""

    @property
    def total(self) -> float:
        """The whole bar."""
        return sum(amount for _, amount in self.parts)


def bars_of(found: Capacity, *, priced: bool) -> tuple[Bar, ...]:
    """The best first, then the other ways, then whole cards per model."""
    bars = [_bar(p, best=p is found.best) for p in (found.best, *found.others) if p.gpus]
    kept = {b.label: b for b in reversed(bars)}  # the same cards may be divided in another way: of these the first
    kept = {b.label: kept[b.label] for b in bars}
    whole = tuple(
        (m.demand, (m.whole_cost_per_hour if priced else float(m.whole_cards or 0)) or 0.0)
        for m in found.models
        if m.replicas and m.whole_cards is not None
    )
    left_out = [m.demand for m in found.models if m.replicas and m.whole_cards is None]
    note = f"without {', '.join(left_out)}, which no whole card holds" if left_out else ""
    return (*kept.values(), *((Bar("whole cards per model", whole, note=note),) if whole else ()))


def _bar(purchase: Purchase, *, best: bool) -> Bar:
    label = " + ".join(f"{n} x {p}" for p, n in purchase.gpus.items())
    missing = ", ".join(u.demand for u in purchase.plan.unmet)
    return Bar(
        label, tuple(costs_of_demands(purchase.plan).items()), best, f"does not serve {missing}" if missing else ""
    )


def svg(bars: Sequence[Bar], *, title: str, priced: bool) -> str:
    """The bars as a picture that needs nothing else: no script, no font, no style sheet."""
    names = list(dict.fromkeys(part for b in bars for part, _ in b.parts))
    colours = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)}
    most = max((b.total for b in bars), default=0.0) or 1.0
    height = _TOP + _ROW * len(bars) + 18 + _LEGEND * -(-len(names) // 4)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 110} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="white"/><text x="16" y="26" font-size="16">{escape(title)}</text>',
    ]
    for row, bar in enumerate(bars):
        lines += _svg_row(bar, _TOP + _ROW * row, most, colours, priced=priced)
    for i, name in enumerate(names):
        x, y = 16 + (i % 4) * 215, _TOP + _ROW * len(bars) + 14 + _LEGEND * (i // 4)
        lines.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colours[name]}"/>')
        lines.append(f'<text x="{x + 18}" y="{y}">{escape(_short(name, 26))}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _svg_row(bar: Bar, y: int, most: float, colours: dict[str, str], *, priced: bool) -> list[str]:
    weight = ' font-weight="bold"' if bar.best else ""
    text_y = y + _BAR - 6
    lines = [
        f'<text x="{_LEFT - 8}" y="{text_y}" text-anchor="end"{weight}>{escape(_short(bar.label, _LABEL_LENGTH))}</text>'
    ]
    x = float(_LEFT)
    for name, amount in bar.parts:
        width = _WIDTH * amount / most
        told = f"{amount:.2f}" if priced else f"{amount:g}"
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colours[name]}" stroke="white">'
            f"<title>{escape(name)}: {told}</title></rect>"
        )
        x += width
    total = f"{bar.total:.2f}" if priced else f"{bar.total:g}"
    note = f" ({bar.note})" if bar.note else ""
    lines.append(f'<text x="{x + 8:.1f}" y="{text_y}"{weight}>{total}{escape(note)}</text>')
    return lines


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
