"""Who did what when: spans of every rank, drawn into one HTML file that opens offline.

Comes in: named spans, appended by each rank to a file of its own (no rank waits for another);
goes out: timeline.html with a lane for each. Clocks are the hosts' own: lanes of different nodes
may be off by their difference. A resumed run begins its lanes anew. Must not import torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spmd_rl.metrics import read

FOLDER, NAME = "timeline", "timeline.html"
MOST_SPANS = 20_000  # a lane's newest spans are drawn; a browser pans over so many without lag


class Timeline:
    """One lane: `with timeline.span("train"): ...`."""

    def __init__(self, run_dir: Path, lane: str):
        path = run_dir / FOLDER / f"{lane}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        began = time.time()
        try:
            yield
        finally:
            self.add(name, began, time.time(), **details)

    def add(self, name: str, began: float, ended: float, **details: Any) -> None:
        span = {"name": name, "at": round(began, 4), "for": round(ended - began, 4)} | details
        self.file.write(json.dumps(span) + "\n")

    def close(self) -> None:
        self.file.close()


def draw(run_dir: Path) -> Path | None:
    """Write timeline.html from all lanes; None when nothing was recorded."""
    files = sorted((run_dir / FOLDER).glob("*.jsonl"), key=lambda p: (len(p.stem), p.stem))
    lanes = [{"lane": path.stem, "spans": read(path)[-MOST_SPANS:]} for path in files]
    starts = [span["at"] for lane in lanes for span in lane["spans"]]
    if not starts:
        return None
    for lane in lanes:
        lane["spans"] = [s | {"at": round(s["at"] - min(starts), 4)} for s in lane["spans"]]
    data = json.dumps(lanes).replace("</", "<\\/")
    path = run_dir / NAME
    page = PAGE.replace("__TITLE__", run_dir.name).replace("__LANES__", data)
    path.write_text(page, encoding="utf-8")
    return path


PAGE = """<!doctype html>
<meta charset="utf-8"><title>__TITLE__: timeline</title>
<style>
  body { font: 13px system-ui, sans-serif; margin: 16px; color: #222; background: #fff }
  canvas { width: 100%; border: 1px solid #ccc; cursor: grab }
  #legend span { display: inline-block; margin: 0 14px 8px 0 }
  #legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px }
  #tip { position: fixed; background: #222; color: #fff; padding: 3px 7px; border-radius: 3px;
         pointer-events: none; display: none; white-space: pre }
</style>
<h3>__TITLE__: who did what when</h3>
<div id="legend"></div><canvas id="view"></canvas><div id="tip"></div>
<p>Wheel: zoom. Drag: move. Double click: all.</p>
<script>
const lanes = __LANES__, colours = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee",
  "#aa3377", "#bbbbbb", "#ee7733", "#009988", "#332288"];
const names = [...new Set(lanes.flatMap(l => l.spans.map(s => s.name)))];
const colour = name => colours[names.indexOf(name) % colours.length];
const end = Math.max(...lanes.flatMap(l => l.spans.map(s => s.at + s.for)), 0.001);
const legend = document.getElementById("legend");
for (const name of names) {
  const item = document.createElement("span"), box = document.createElement("i");
  box.style.background = colour(name);
  item.append(box, name);
  legend.append(item);
}
const view = document.getElementById("view"), tip = document.getElementById("tip");
const left = 110, row = 26, top_ = 20, pen = view.getContext("2d");
let from = 0, to = end, drag = null;
const width = () => view.clientWidth - left;
const x = t => left + (t - from) / (to - from) * width();
const time = px => from + (px - left) / width() * (to - from);
function draw() {
  const scale = devicePixelRatio || 1, height = top_ + lanes.length * row + 4;
  view.style.height = height + "px";
  view.width = view.clientWidth * scale;
  view.height = height * scale;
  pen.scale(scale, scale);
  pen.font = "12px system-ui, sans-serif";
  const step = 10 ** Math.floor(Math.log10((to - from) / 4));
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    pen.fillStyle = "#eee"; pen.fillRect(x(t), top_, 1, height);
    pen.fillStyle = "#888"; pen.fillText(+t.toFixed(4) + " s", x(t) + 2, 13);
  }
  lanes.forEach((lane, i) => {
    const y = top_ + i * row;
    for (const s of lane.spans) {
      if (s.at + s.for < from || s.at > to) continue;
      const a = Math.max(x(s.at), left), b = x(s.at + s.for);
      pen.fillStyle = colour(s.name);
      pen.fillRect(a, y + 3, Math.max(b - a, 1), row - 6);
      if (b - a > 8 * s.name.length) {
        pen.fillStyle = "#fff"; pen.fillText(s.name, a + 4, y + row / 2 + 4);
      }
    }
    pen.fillStyle = "#fff"; pen.fillRect(0, y, left, row);
    pen.fillStyle = "#222"; pen.fillText(lane.lane, 6, y + row / 2 + 4);
  });
}
function under(event) {
  const lane = lanes[Math.floor((event.offsetY - top_) / row)], t = time(event.offsetX);
  return lane && lane.spans.find(s => s.at <= t && t <= s.at + s.for);
}
view.onwheel = event => {
  event.preventDefault();
  const t = time(event.offsetX), by = Math.exp(event.deltaY / 500);
  from = Math.max(0, t - (t - from) * by);
  to = Math.min(end, t + (to - t) * by);
  draw();
};
view.onmousedown = event => { drag = { t: time(event.offsetX) } };
onmouseup = () => { drag = null };
view.onmousemove = event => {
  if (drag) {
    const by = drag.t - time(event.offsetX), room = Math.min(Math.max(by, -from), end - to);
    from += room; to += room;
    draw();
  }
  const span = under(event);
  tip.style.display = span ? "block" : "none";
  if (span) {
    tip.textContent = Object.entries(span).map(([k, v]) => k + ": " + v).join("\\n");
    tip.style.left = event.clientX + 12 + "px";
    tip.style.top = event.clientY + 12 + "px";
  }
};
view.ondblclick = () => { from = 0; to = end; draw() };
onresize = draw;
draw();
</script>
"""
