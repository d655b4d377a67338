#!/usr/bin/env python3
"""Draws steps of a trace as a picture: a row per track, time from left to right.

    draw_trace.py OUT.svg runs/NAME/trace/rank-*.json [--steps 2 3] [--title TEXT] [--span MS]

In the row of the computation, the parts of an action in which it waits for a lane are pale.

Traces are what `run.trace_steps` leaves in a run directory (docs/src/tracing.md). Needs nothing but
the standard library.
"""

import argparse
import json
from html import escape

# Category of a span: colour, name in the legend. The legend shows what occurs, in this order.
COLOURS = {
    "data": ("#b0b7c3", "data"),
    "forward": ("#4c8bd0", "forward"),
    "recompute": ("#9cc3ec", "recompute"),
    "backward": ("#2f5d9b", "backward"),
    "norm": ("#b59ad6", "norm"),
    "control": ("#7a4fb5", "control"),
    "optimizer": ("#3f9c64", "optimizer"),
    "reduce": ("#e08a3c", "reduce-scatter"),
    "gather": ("#e3bd4a", "all-gather"),
    "replicate": ("#c9603f", "all-reduce of replicas"),
    "evaluate": ("#6fb6b0", "evaluate"),
    "validation": ("#6fb6b0", "validation"),
    "replica check": ("#a9865b", "replica check"),
    "save": ("#8c8c8c", "save"),
    "wait": ("#d64545", "waiting for a lane"),
}
# What has no time of its own: it contains other spans, or lies inside one that is drawn.
UNDRAWN = {"step", "operation", "exchange"}
LEFT, WIDTH, ROW, GAP = 96, 1100, 22, 4


class Trace:
    """Spans of one rank by track, in milliseconds."""

    def __init__(self, path):
        with open(path) as file:
            trace = json.load(file)
        self.rank = trace["otherData"]["rank"]
        # Ranks count from one origin; files of other runs have another.
        self.origin = trace["otherData"]["origin_unix_seconds"]
        names = {}
        self.tracks = {}
        self.steps = {}
        for event in trace["traceEvents"]:
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
                self.tracks[event["args"]["name"]] = []
            if event["ph"] != "X":
                continue
            begin, end = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
            if event["cat"] == "step":
                self.steps[int(event["name"].split()[1])] = (begin, end)
            if event["cat"] not in UNDRAWN:
                self.tracks[names[event["tid"]]].append((begin, end, event["cat"], event["name"]))


def merged(spans, begin, end, scale):
    """Spans between two times. Neighbours of one colour closer than a pixel become one."""
    drawn = []
    for start, stop, category, name in sorted(spans):
        start, stop = max(start, begin), min(stop, end)
        if stop <= start:
            continue
        if (stop - start) * scale < 0.05 and category == "wait":
            continue
        small = (stop - start) * scale < 1.5
        if drawn and small and drawn[-1][2] == category and (start - drawn[-1][1]) * scale < 0.5:
            drawn[-1][1] = stop
        else:
            drawn.append([start, stop, category, name])
    return drawn


def rows(traces):
    """(rank, track, spans) of every track on which something happened."""
    for trace in traces:
        for track, spans in trace.tracks.items():
            if spans:
                yield trace.rank, track, spans


def draw(traces, steps, title, span):
    first = [trace.steps[steps[0]][0] for trace in traces]
    last = [trace.steps[steps[1]][1] for trace in traces]
    begin = min(first)
    end = begin + span if span else max(last)
    scale = WIDTH / (end - begin)
    x = lambda time: LEFT + (time - begin) * scale
    out, used, y, rank = [], set(), 44, None
    for of_rank, track, spans in rows(traces):
        spans = merged(spans, begin, end, scale)
        if not spans:
            continue
        if of_rank != rank:
            rank = of_rank
            y += 18
            out.append(f'<text x="4" y="{y}" font-weight="bold">rank {rank}</text>')
            y += 6
        out.append(f'<text x="8" y="{y + 15}">{escape(track)}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}" fill="#f3f4f6"/>')
        for start, stop, category, name in spans:
            colour = COLOURS.get(category, ("#555555", category))[0]
            used.add(category)
            width = max((stop - start) * scale, 0.3)
            out.append(
                f'<rect x="{x(start):.1f}" y="{y}" width="{width:.1f}" height="{ROW}"'
                f' fill="{colour}"><title>{escape(name)}, {stop - start:.2f} ms</title></rect>'
            )
            short = name.replace("wait for ", "")
            if category in ("forward", "backward", "recompute"):
                short = short.split(" ", 1)[-1]
            if width > 6 * len(short) + 6:
                out.append(
                    f'<text x="{x(start) + width / 2:.1f}" y="{y + 15}" text-anchor="middle"'
                    f' fill="#fff" font-size="10">{escape(short)}</text>'
                )
        if track == "compute":
            # Whoever waits does nothing else.
            waits = next(trace for trace in traces if trace.rank == rank).tracks["waits"]
            for start, stop, *_ in merged(waits, begin, end, scale):
                out.append(
                    f'<rect x="{x(start):.1f}" y="{y}" width="{(stop - start) * scale:.1f}"'
                    f' height="{ROW}" fill="#fff" fill-opacity="0.8"/>'
                )
        y += ROW + GAP
    axis = []
    length = end - begin
    tick = next(t for p in range(-2, 6) for t in (10**p, 2 * 10**p, 5 * 10**p) if length / t <= 12)
    for index in range(int(length / tick) + 1):
        at = x(begin + index * tick)
        axis.append(f'<path d="M{at:.1f} 62V{y}" stroke="#0002"/>')
        axis.append(
            f'<text x="{at:.1f}" y="{y + 14}" text-anchor="middle">{index * tick:g}</text>'
        )
    axis.append(f'<text x="8" y="{y + 14}">milliseconds</text>')
    legend, at = [], LEFT
    for category, (colour, text) in COLOURS.items():
        if category in used:
            legend.append(f'<rect x="{at}" y="30" width="10" height="10" fill="{colour}"/>')
            legend.append(f'<text x="{at + 14}" y="39">{text}</text>')
            at += 30 + 6.2 * len(text)
    body = "\n".join(
        [f'<text x="4" y="18" font-size="14" font-weight="bold">{escape(title)}</text>']
        + legend + out + axis
    )
    width, height = LEFT + WIDTH + 36, y + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' font-family="sans-serif" font-size="11" fill="#222">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--steps", nargs=2, type=int, metavar=("FIRST", "LAST"))
    parser.add_argument("--title")
    parser.add_argument("--span", type=float, metavar="MS", help="show this many milliseconds")
    args = parser.parse_args()
    traces = sorted((Trace(path) for path in args.traces), key=lambda trace: trace.rank)
    if len({trace.origin for trace in traces}) > 1:
        parser.error("the traces are of several runs or attempts, which share no time")
    steps = args.steps or [min(traces[0].steps), max(traces[0].steps)]
    for trace in traces:
        for step in steps:
            if step not in trace.steps:
                parser.error(f"rank {trace.rank} has no step {step}, only {sorted(trace.steps)}")
    title = args.title or f"Steps {steps[0]} to {steps[1]}"
    with open(args.out, "w") as file:
        file.write(draw(traces, steps, title, args.span))


if __name__ == "__main__":
    main()
