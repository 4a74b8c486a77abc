"""results.svg: pull and run of each workload and link by way, each in proportion to the eager way, written by hand."""

import html

from figures import median, order, select

COLOURS = {"overlayfs": ("#8a8f98", "#c3c7cd"), "lazurite": ("#1565c0", "#7fb3ec"), "prefetch": ("#2e7d32", "#8fcb93")}
PEER = ("#b26a00", "#e5b96f")
LEFT, TOP, COLUMN, BAR, GAP = 92, 74, 252, 11, 12
SPAN = COLUMN - 78


def draw(result):
    """The picture as text, or None if nothing was measured that it could show."""
    rows = (result["sections"].get("start") or {}).get("rows", [])
    if not rows:
        return None
    links, workloads = order(rows, "link"), order(rows, "workload")
    ways = sorted(order(rows, "way"), key=lambda way: (list(COLOURS) + [way]).index(way))
    group = len(ways) * (BAR + 2) + GAP
    width, height = max(640, LEFT + COLUMN * len(links) + 10), TOP + group * len(workloads) + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
           'font-family="sans-serif" font-size="11">', f'<rect width="{width}" height="{height}" fill="white"/>',
           text(LEFT, 18, "From the start of the pull until the program is ready, in proportion to an eager pull", 14)]
    at = LEFT
    for way in ways:
        dark, light = COLOURS.get(way, PEER)
        out += [box(at, 28, 10, 10, dark), box(at + 10, 28, 10, 10, light), text(at + 25, 37, f"{way}: pull, run")]
        at += 150
    for column, link in enumerate(links):
        x = LEFT + column * COLUMN
        out.append(text(x, TOP - 14, result["links"].get(link, {}).get("label", link), 12, bold=True))
        # The line at which the eager way ends.
        out.append(f'<line x1="{x + SPAN}" y1="{TOP - 8}" x2="{x + SPAN}" y2="{height - 30}" stroke="#999" '
                   'stroke-dasharray="2 3"/>')
        for line, workload in enumerate(workloads):
            y = TOP + line * group
            if column == 0:
                out.append(text(LEFT - 8, y + group / 2, workload, 12, anchor="end"))
            base = median(select(rows, link=link, workload=workload, way="overlayfs"), "total_s")
            for index, way in enumerate(ways):
                some = select(rows, link=link, workload=workload, way=way)
                pull, run = median(some, "pull_s"), median(some, "run_s")
                if pull is None or not base:
                    continue
                scale, top = SPAN / base, y + index * (BAR + 2)
                dark, light = COLOURS.get(way, PEER)
                # What is far slower than eager is cut off; its label has the seconds.
                first = min(pull * scale, COLUMN - 50)
                second = min(run * scale, COLUMN - 50 - first)
                out += [box(x, top, first, BAR, dark), box(x + first, top, second, BAR, light),
                        text(x + first + second + 3, top + BAR - 2, f"{pull + run:.2f} s", 10)]
    out.append(text(LEFT, height - 10, f"commit {result['commit']}, {result['machine']}; medians of {result['runs']}", 10))
    return "\n".join(out + ["</svg>", ""])


def text(x, y, words, size=11, bold=False, anchor="start"):
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{html.escape(words)}</text>'


def box(x, y, width, height, colour):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height}" fill="{colour}"/>'
