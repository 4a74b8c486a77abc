"""Medians and the selection of measured rows; shared by report, plot and targets, so that all show the same figures."""

import statistics


def select(rows, **wanted):
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def median(rows, *path):
    """The median of a figure, which may lie deeper: median(rows, "before_ready", "bytes"). None if nobody has it."""
    values = []
    for row in rows:
        value = row
        for key in path:
            value = value.get(key) if value is not None else None
        if value is not None:
            values.append(value)
    return statistics.median(values) if values else None


def ratio(one, other):
    return one / other if one is not None and other else None


def percentile(values, percent):
    """The value that `percent` of the measured ones do not exceed; with few of them the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else None


def order(rows, key):
    """The values of a key in the order of their first row."""
    return list(dict.fromkeys(row[key] for row in rows))


def warm_ratios(rows):
    """{(way, operation): the median over rounds of its time to overlayfs' in the same round}."""
    found = {}
    for operation in order(rows, "operation"):
        base = {row["round"]: row["seconds"] for row in select(rows, operation=operation, way="overlayfs")}
        for way in order(rows, "way"):
            ratios = [row["seconds"] / base[row["round"]] for row in select(rows, operation=operation, way=way)
                      if base.get(row["round"])]
            if ratios:
                found[way, operation] = statistics.median(ratios)
    return found


def noise(rows, operation):
    """How far the rounds of overlayfs itself lie apart: half the distance of the quartiles, as a share of the median."""
    values = sorted(row["seconds"] for row in select(rows, operation=operation, way="overlayfs"))
    if len(values) < 3:
        return None
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / 2 / statistics.median(values)
