"""results.md: what must be reached first, then the tables of each section, ratios before figures."""

import targets
from link import SHAPES
from figures import median, noise, order, percentile, ratio, select, warm_ratios

MIB = 1 << 20


def write(result, plotted):
    sections = result["sections"]
    lines = ["# Measured", "",
             f"By `make bench` at commit {result['commit']} (program sha256 {result['program']}) on {result['machine']}. "
             f"Medians of {result['runs']} "
             f"run{'s' if result['runs'] != 1 else ''}, ways interleaved, page cache dropped before each; the whole took "
             f"{result['seconds'] / 60:.0f} min." + (" **A quick run: single measurements.**" if result["quick"] else ""), ""]
    lines += compared(result)
    for name, write_section in (("start", start), ("warm", warm), ("attach", attach), ("fill", fill), ("convert", convert)):
        if sections.get(name):
            lines += write_section(sections[name], result, plotted)
    if result["notes"]:
        lines += ["## Notes of this run", ""] + [f"- {note}" for note in result["notes"]] + [""]
    return "\n".join(lines)


def table(header, rows):
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def show(value, form="{:.2f}"):
    return "–" if value is None else form.format(value)


def mib(value):
    return show(value / MIB if value is not None else None, "{:.1f}")


def compared(result):
    rows = targets.compare(result)
    words = {True: "met", False: "**missed**", None: ""}
    return ["## What must be reached", "", *table(["figure", "must reach", "measured", ""],
            [(figure, must, measured, words[met]) for figure, must, measured, met in rows])]


def start(section, result, plotted):
    rows = section["rows"]
    ways = [way for way in order(rows, "way")]
    ways = [way for way in ("overlayfs", "lazurite", "prefetch") if way in ways] + [
        way for way in ways if way not in ("overlayfs", "lazurite", "prefetch")]
    lines = ["## From nothing to a program that is ready", "",
             "`overlayfs` is an eager pull of the ordinary image by containerd; `lazurite` the eStargz image on the default "
             "configuration; `prefetch` that image with the files of a start in front, behind a landmark. *Ready* is the "
             "program's own word. *Local* is the time from the start of the pull until everything is on disk; *again* a fresh "
             "container after that, with the page cache dropped, *create* making one alone (`ctr containers create`).", ""]
    measured = [f"{link['label']}: {link['rtt_ms']} ms, {link['mbit']} Mbit/s for one connection"
                for link in result["links"].values() if "rtt_ms" in link]
    if measured:
        lines += ["The delay of a link is its round trip. Shaped links are two network namespaces joined by a relay that holds "
                  "back every packet (so handshakes and slow start take what they take on a real line) and limited by `tc "
                  "tbf`. What they do, measured: " + "; ".join(measured) + ".", ""]
    if plotted:
        lines += ["![pull and run by workload, link and way](results.svg)", ""]

    def of(workload, link, way, *path):
        return median(select(rows, workload=workload, link=link, way=way), *path)

    def against(workload, link, way, *path):
        return ratio(of(workload, link, way, *path), of(workload, link, "overlayfs", *path))

    def line_share(workload, link, way):
        """What was fetched until everything was local, of what the line carries in that time."""
        share = ratio(of(workload, link, way, "in_total", "bytes"), of(workload, link, way, "local_s"))
        return share and 100 * share * 8 / (SHAPES[link].mbit * 1e6)

    others = [way for way in ways if way != "overlayfs"]
    for link in order(rows, "link"):
        some = select(rows, link=link)
        lines += [f"### {result['links'][link]['label']}", "",
                  "Times as fast as eager, pull + run; then in relation to eager.", ""]
        header = ["workload", *(f"{way}, times faster" for way in others), *(f"{way}, local" for way in others),
                  *(f"{way}, again" for way in others)]
        lines += table(header, [
            [workload, *(show(ratio(1, against(workload, link, way, "total_s")), "{:.1f}x") for way in others),
             *(show(against(workload, link, way, "local_s"), "{:.2f}x") for way in others),
             *(show(against(workload, link, way, "again_s"), "{:.2f}x") for way in others)]
            for workload in order(some, "workload")])
        lines += table(
            ["workload", "way", "pull s", "run s", "total s", "local s", "graduated s", "again s", "create s", "requests to ready", "of all",
             "MiB to ready", "of all", "daemon CPU s to ready", "of all", "RSS MiB", "peak MiB", "disk / unpacked",
             *(["rate until local"] if link != "loopback" else [])],
            [[workload, way,
              *(show(of(workload, link, way, key)) for key in ("pull_s", "run_s", "total_s", "local_s", "graduated_s", "again_s", "create_s")),
              show(of(workload, link, way, "before_ready", "requests"), "{:.0f}"),
              show(of(workload, link, way, "in_total", "requests"), "{:.0f}"),
              mib(of(workload, link, way, "before_ready", "bytes")), mib(of(workload, link, way, "in_total", "bytes")),
              show(of(workload, link, way, "cpu_ready_s")), show(of(workload, link, way, "cpu_s")),
              show(of(workload, link, way, "rss_mib"), "{:.0f}"), show(of(workload, link, way, "peak_mib"), "{:.0f}"),
              show(against(workload, link, way, "disk_bytes"), "{:.3f}"),
              *([show(line_share(workload, link, way), "{:.0f} %")] if link != "loopback" else [])]
             for workload in order(some, "workload") for way in ways if select(some, workload=workload, way=way)])
    trips = section.get("round_trips")
    if trips:
        lines += ["Round trips that follow one another before the program is ready (python): how much longer it takes when each "
                  "takes 100 ms longer, at 1 Gbit/s; those of handshakes and slow start are in it. `ondemand` is `lazurite` "
                  "without the fill.", "",
                  *table(["way", "total", "pull", "run"],
                         [[way, *(show(value[part], "{:.1f}") for part in ("total", "pull", "run"))]
                          for way, value in trips.items()])]
    lines += ["The daemon of `overlayfs` is containerd, whose CPU seconds are without those of the client that downloads. "
              "It keeps the compressed blobs beside the unpacked layers, which `disk / unpacked` does not count. *Rate until local* is the share of the line's rate that the way used from the "
              "start of the pull until everything was local.", ""]
    return lines


def warm(rows, result, plotted):
    ratios, ways = warm_ratios(rows), order(rows, "way")
    others = [way for way in ways if way != "overlayfs"]
    return ["## The mounted tree", "", "The python image as containerd mounts it, and one file of 256 MiB for sequential and "
            "random reads. Ratios are medians over rounds of the time to overlayfs' in the same round; the noise is that of overlayfs "
            "between rounds.", "",
            *table(["operation", *(f"{way} / overlayfs" for way in others), "noise", *(f"{way} s" for way in ways)],
                   [[operation, *(show(ratios.get((way, operation)), "{:.2f}x") for way in others),
                     show(noise(rows, operation) and 100 * noise(rows, operation), "± {:.0f} %"),
                     *(show(median(select(rows, way=way, operation=operation), "seconds"), "{:.3f}") for way in ways)]
                    for operation in order(rows, "operation")])]


def attach(section, result, plotted):
    lines = ["## Many layers", "", "Small layers of 40 files, all of them filled.", "",
             *table(["layers attached", "RSS MiB", "of it not mapped files", "peak MiB"],
                    [[layers, *(show(figures[key], "{:.1f}") for key in ("rss_mib", "private_mib", "peak_mib"))]
                     for layers, figures in section["memory"].items()]),
             *table(["image", "layers", "cold pull s", "daemon CPU s", "requests for layers", "pull when known s", "daemon CPU s",
                     "requests for layers"],
                    [[row["image"], row["cold"]["layers"], show(row["cold"]["seconds"]), show(row["cold"]["cpu_s"]),
                      row["cold"]["layer_requests"], show(row["known"]["seconds"]), show(row["known"]["cpu_s"]),
                      row["known"]["layer_requests"]] for row in section["images"]])]
    prepare, restart, wide = section["prepare_ms"], section["restart"], section["wide"]
    times = prepare["times"]
    lines += [f"The daemon's answer to one Prepare of a known layer ({len(times)} in a row): median "
              f"{percentile(times, 50):.2f} ms, p90 {percentile(times, 90):.2f} ms, longest {max(times):.2f} ms; "
              f"{prepare['requests']} requests.", "",
              f"Restart with {restart['layers']} layers: the socket answers after "
              f"{', '.join(f'{1000 * seconds:.0f}' for seconds in restart['seconds'])} ms; {restart['requests']} requests; "
              f"{restart['memory']['rss_mib']:.1f} MiB afterwards.", "",
              f"A layer of 50,000 entries, cold: pull {median(wide, 'seconds'):.2f} s, {1000 * median(wide, 'cpu_s'):.0f} ms of "
              f"the daemon's CPU (in steps of 10 ms), {median(wide, 'layer_requests'):.0f} requests, "
              f"{median(wide, 'memory', 'rss_mib'):.1f} MiB RSS.", ""]
    return lines


def fill(section, result, plotted):
    rows = section["cpu"]
    lines = ["## Filling", "", f"The yardstick: inflate by zlib {section['zlib']} member by member, SHA-256, one copy, by Python "
             "on the same blob in the same run. The daemon also receives, writes and answers.", "",
             *table(["image", "CPU / yardstick", "daemon CPU s/GB", "inflate", "sha256", "copy", "requests / MiB", "MiB",
                     "seconds", "peak MiB"],
                    [[workload, show(ratio(median(some, "cpu_s_per_gb"), median(some, "yardstick", "cpu_s_per_gb")), "{:.2f}x"),
                      show(median(some, "cpu_s_per_gb")),
                      *(show(median(some, "yardstick", key)) for key in ("inflate", "sha256", "copy")),
                      show(ratio(median(some, "blob_requests"), median(some, "blob_mib"))),
                      show(median(some, "blob_mib"), "{:.1f}"), show(median(some, "seconds")), show(median(some, "peak_mib"), "{:.0f}")]
                     for workload in order(rows, "workload") for some in [select(rows, workload=workload)]])]
    both = [(row, select(rows, workload=row["workload"])) for row in section.get("checked", [])]
    if both:
        lines += ["With `fetch.check_blob_digest`, until the layers are plain directories, and without:", "",
                  *table(["image", "seconds", "without", "daemon CPU s", "without", "MiB fetched", "without"],
                         [[row["workload"], show(row["graduated_s"]), show(median(some, "graduated_s")),
                           show(row["cpu_graduated_s"]), show(median(some, "cpu_graduated_s")),
                           mib(row["bytes"]), mib(median(some, "bytes"))] for row, some in both])]
    lines += ["On-demand reads of one chunk of 4 MiB each, alone and while everything else is being fetched:", "",
              *table(["link", "image", "idle p50 ms", "p99", "under fill p50 ms", "p99", "p99 ratio", "reads"],
                     [[row["link"], row["workload"], *(show(percentile(row[key], percent), "{:.1f}")
                       for key in ("idle_ms", "loaded_ms") for percent in (50, 99)),
                       show(ratio(percentile(row["loaded_ms"], 99), percentile(row["idle_ms"], 99)), "{:.2f}x"),
                       f"{len(row['idle_ms'])}, {len(row['loaded_ms'])}"] for row in section["latency"]])]
    return lines


def convert(section, result, plotted):
    ours, theirs = section["ours"], section["theirs"]
    lines = ["## Converting an image to eStargz", "",
             f"Debian with Python, {section['bytes']['plain'] / MIB:.1f} MiB of layers, from a containerd's content store into "
             "it.", ""]
    seconds, cpu = median(ours, "wall_s"), median(ours, "cpu_s")
    if theirs:
        other = theirs[0]
        lines += table(["", f"`lazurite convert` (median of {len(ours)})", "`ctr-remote image convert --estargz`", "ratio"], [
            ["time", f"{seconds:.2f} s", f"{other['wall_s']:.2f} s", f"{other['wall_s'] / seconds:.1f} times faster"],
            ["CPU", f"{cpu:.2f} s", f"{other['cpu_s']:.2f} s of the client", ""],
            ["layers", f"{section['bytes']['ours'] / MIB:.2f} MiB", f"{section['bytes']['theirs'] / MIB:.2f} MiB",
             f"{100 * (section['bytes']['ours'] / section['bytes']['theirs'] - 1):+.2f} %"]])
    else:
        lines += [f"`lazurite convert`: {seconds:.2f} s, {cpu:.2f} CPU seconds (median of {len(ours)}).", ""]
    if section.get("big"):
        big = section["big"]
        lines += [f"A layer of 4 GiB, from an OCI layout into another: {big['wall_s']:.1f} s, {big['cpu_s']:.1f} CPU seconds, "
                  f"{big['peak_mib']:.0f} MiB of memory at the peak.", ""]
    return lines
