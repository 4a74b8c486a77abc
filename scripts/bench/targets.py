"""The figures that must be reached, and what was measured of each: met, missed, or not measured in this run."""

from figures import median, noise, order, percentile, ratio, select, warm_ratios

MIB = 1 << 20
# A graduated layer is a native directory; what differs from overlayfs by less than this is noise of two mounts.
WITHIN_NOISE = 0.10


def compare(result):
    """[(figure, must reach, measured, met: True, False or None)]"""
    rows = []
    sections = result["sections"]

    def add(figure, must, value, met, show="{:.2f}"):
        text = "not measured" if value is None else show.format(value) if not isinstance(value, str) else value
        rows.append((figure, must, text, None if value is None else bool(met)))

    start(add, sections.get("start") or {})
    fill(add, sections.get("fill"))
    warm(add, sections.get("warm"))
    disk(add, (sections.get("start") or {}).get("rows", []))
    attach(add, sections.get("attach"), (sections.get("start") or {}).get("rows", []))
    return rows


def worst(found, highest):
    """The worst of {(workload, link): ratio}, as text with where it was."""
    found = {key: value for key, value in found.items() if value is not None}
    if not found:
        return None, None
    key = (max if highest else min)(found, key=found.get)
    return found[key], f"{found[key]:.2f}x at worst ({', '.join(key)}; {len(found)} measured)"


def start(add, section):
    rows = section.get("rows", [])

    def of(workload, link, way, *path):
        return median(select(rows, workload=workload, link=link, way=way), *path)

    pull = ratio(of("python", "loopback", "overlayfs", "pull_s"), of("python", "loopback", "lazurite", "pull_s"))
    add("pull of the python image, loopback", "≥ 20x faster than eager", pull, pull and pull >= 20, "{:.1f}x")
    run = ratio(of("python", "loopback", "lazurite", "run_s"), of("python", "loopback", "overlayfs", "run_s"))
    add("its run", "≤ 1.15x of the eager run", run, run and run <= 1.15, "{:.2f}x")
    pre = ratio(of("python", "loopback", "prefetch", "run_s"), of("python", "loopback", "overlayfs", "run_s"))
    add("its run, with the prefetch landmark", "≤ 1.15x of the eager run", pre, pre and pre <= 1.15, "{:.2f}x")
    for way in ("lazurite", "prefetch"):
        total = ratio(of("python", "200m20ms", "overlayfs", "total_s"), of("python", "200m20ms", way, "total_s"))
        add(f"pull + run, python, 200 Mbit/s and 20 ms, {way}", "≥ 5x faster", total, total and total >= 5, "{:.1f}x")
    for way, trips in (section.get("round_trips") or {"lazurite": {"total": None}}).items():
        trips = trips["total"]
        add(f"round trips before the program is ready, python, {way}", "≤ 8", trips, trips is not None and trips <= 8, "{:.1f}")
    pairs = [(workload, link) for link in order(rows, "link") for workload in order(rows, "workload")]
    value, text = worst({(w, l): ratio(of(w, l, "lazurite", "total_s"), of(w, l, "overlayfs", "total_s"))
                         for w, l in pairs}, highest=True)
    add("pull + run to ready, every workload and link", "≤ 1x of eager", text, value is not None and value <= 1)
    for shaped, must in ((False, 0.5), (True, 1.0)):
        value, text = worst({(w, l): ratio(of(w, l, "lazurite", "local_s"), of(w, l, "overlayfs", "local_s"))
                             for w, l in pairs if (l != "loopback") == shaped}, highest=True)
        add("everything local, " + ("every shaped link" if shaped else "loopback"), f"≤ {must:.1f}x of eager pull + unpack",
            text, value is not None and value <= must)


def fill(add, section):
    section = section or {"cpu": [], "latency": []}
    for workload in order(section["cpu"], "workload") or ["python"]:
        rows = select(section["cpu"], workload=workload)
        value = ratio(median(rows, "cpu_s_per_gb"), median(rows, "yardstick", "cpu_s_per_gb"))
        add(f"CPU per GB delivered, {workload}", "≤ 1.3x of inflate + sha256 + copy", value, value and value <= 1.3, "{:.2f}x")
        value = ratio(median(rows, "blob_requests"), median(rows, "blob_mib"))
        add(f"requests per MiB while filling, {workload}", "≤ 1", value, value and value <= 1)
    for row in section["latency"] or [{"link": "loopback", "idle_ms": [], "loaded_ms": []}]:
        value = ratio(percentile(row["loaded_ms"], 99), percentile(row["idle_ms"], 99))
        add(f"on-demand p99 under full fill, {row['link']}", "≤ 2x of idle", value, value and value <= 2, "{:.2f}x")


def warm(add, rows):
    rows = rows or []
    ratios = warm_ratios(rows)
    for operation in ("tar, warm", "find -ls, warm", "random 4 KiB reads, warm"):
        slack = max(WITHIN_NOISE, 2 * (noise(rows, operation) or 0))
        value = ratios.get(("graduated", operation))
        add(f"{operation}, graduated", f"overlayfs within noise (± {100 * slack:.0f} %)", value,
            value and value <= 1 + slack, "{:.2f}x")
        value = ratios.get(("lazy", operation))
        add(f"{operation}, lazy", "≤ 1.3x of overlayfs", value, value and value <= 1.3, "{:.2f}x")


def disk(add, rows):
    found = {}
    for link in order(rows, "link"):
        for workload in order(rows, "workload"):
            found[workload, link] = ratio(median(select(rows, workload=workload, link=link, way="lazurite"), "disk_bytes"),
                                          median(select(rows, workload=workload, link=link, way="overlayfs"), "disk_bytes"))
    value, text = worst(found, highest=True)
    add("disk when filled", "≤ 1.05x of the unpacked size", text, value is not None and value <= 1.05)


def attach(add, section, start_rows):
    section = section or {}
    memory = section.get("memory", {})
    for layers, most in (("1", 25), ("100", 40)):
        value = memory.get(layers, {}).get("rss_mib")
        add(f"daemon RSS with {layers} layer{'s' if layers != '1' else ''}", f"≤ {most} MiB", value,
            value is not None and value <= most, "{:.1f} MiB")
    # The layers of that section are tiny. What a daemon keeps after a real image is another matter.
    found = {(row["workload"], row["link"]): row["rss_mib"] for row in start_rows if row["way"] == "lazurite"}
    value = max(found.values(), default=None)
    add("daemon RSS after filling a real image, worst", "≤ 40 MiB (3 to 40 layers)",
        value and f"{value:.0f} MiB ({', '.join(max(found, key=found.get))})", value is not None and value <= 40)
    prepare = section.get("prepare_ms", {})
    times = prepare.get("times", [])
    # "Each" is the word: the longest decides, the median is there to tell an outlier from a habit.
    add("attach of a layer whose index is local, each", "≤ 5 ms", f"{max(times):.2f} ms the longest, "
        f"{percentile(times, 50):.2f} ms the median" if times else None, bool(times) and max(times) <= 5)
    value = prepare.get("requests")
    add("requests for that", "0", value, value == 0, "{}")
    value = median(section.get("wide", []), "cpu_s")
    add("cold layer of 50,000 entries", "≤ 100 ms of CPU", value and 1000 * value, value is not None and value <= 0.1,
        "{:.0f} ms")
    restart = section.get("restart", {})
    value = max(restart["seconds"], default=None) if restart else None
    add("restart with 200 layers, slowest", "socket answers within 300 ms", value and 1000 * value,
        value is not None and value <= 0.3, "{:.0f} ms")
    value = restart.get("requests")
    add("requests for that", "0", value, value == 0, "{}")
