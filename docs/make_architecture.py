"""Write docs/architecture.svg: the rooms of the package in the order of the data.

python docs/make_architecture.py
"""

from html import escape
from pathlib import Path

TARGET = Path(__file__).with_name("architecture.svg")
STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 13px; fill: #1f2328; }
  .name { font-weight: 600; font-size: 15px; }
  .data { font-size: 12px; fill: #57606a; font-style: italic; }
  .room { fill: #ddf4ff; stroke: #0969da; }
  .join { fill: #fff8c5; stroke: #9a6700; }
  .ground { fill: #eaeef2; stroke: #57606a; }
  .file { fill: none; stroke: #57606a; stroke-dasharray: 4 3; }
  path { stroke: #57606a; fill: none; stroke-width: 1.5; }
  #head path { fill: #57606a; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .data { fill: #9198a1; }
    .room { fill: #0c2d4a; stroke: #4493f8; } .join { fill: #3a2d05; stroke: #d29922; }
    .ground { fill: #262c36; stroke: #9198a1; } .file, path { stroke: #9198a1; } #head path { fill: #9198a1; }
  }
"""
WIDTH, BOX, HIGH, STEP = 980, 168, 62, 262
ROWS = [
    [
        ("file", "dense model", "safetensors, config"),
        ("room", "models", "tensors, layers, groups"),
        ("room", "calibration", "collectors, passes"),
        ("room", "whitening", "square root of the Gram"),
    ],
    [
        ("file", "checkpoint", "safetensors, config"),
        ("room", "formats", "masks, values, scales"),
        ("room", "solvers", "K-SVD, HTP, rounding"),
        ("room", "allocation", "profile, knapsack"),
    ],
    [
        ("room", "integrations", "load, transformers"),
        ("room", "backends", "kernels, SparseLinear"),
        ("room", "evaluation", "perplexity, speed"),
        ("room", "reporting", "report, model card"),
    ],
]
LABELS = {
    (0, 0): "W",
    (0, 1): "layers",
    (0, 2): "G, E[g²]",
    (1, 0): "bits",
    (1, 1): "D, S",
    (1, 2): "k, s",
    (2, 0): "packed",
    (2, 1): "y = (x D) S",
    (2, 2): "figures",
}


def box(kind: str, x: float, y: float, width: float, name: str, text: str) -> str:
    """Give a box with a name and a line of text."""
    middle = x + width / 2
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{HIGH}" rx="7"/>'
        f'<text class="name" x="{middle}" y="{y + 26}" text-anchor="middle">{escape(name)}</text>'
        f'<text x="{middle}" y="{y + 46}" text-anchor="middle">{escape(text)}</text>'
    )


def arrow(points: str, label: str = "", x: float = 0, y: float = 0, anchor: str = "middle") -> str:
    """Give an arrow through points, with a label."""
    text = f'<text class="data" x="{x}" y="{y}" text-anchor="{anchor}">{escape(label)}</text>' if label else ""
    return f'<path d="{points}" marker-end="url(#head)"/>{text}'


def render() -> str:
    """Give the picture."""
    parts = [
        box("join", 10, 10, WIDTH - 20, "cli", "one file per command: options, progress, tables"),
        box("join", 10, 84, WIDTH - 20, "pipeline", "stages.py joins all rooms below; work folder, records, resume"),
    ]
    top, rise = 180, 106
    for row, rooms in enumerate(ROWS):
        y = top + row * rise
        for column, (kind, name, text) in enumerate(rooms):
            x = 10 + column * STEP + (4 if column else 0)
            parts.append(box(kind, x, y, BOX, name, text))
            if column < len(rooms) - 1:
                left, right, middle = x + BOX + 4, x + STEP - 2, y + HIGH / 2
                ends = (left, right) if row != 1 else (right, left)
                label = LABELS[(row, column)]
                parts.append(arrow(f"M {ends[0]} {middle} L {ends[1]} {middle}", label, (left + right) / 2, middle - 8))
    right, left = 10 + 3 * STEP + 4 + BOX / 2, 10 + BOX / 2
    parts.append(
        arrow(f"M {right} {top + HIGH + 3} L {right} {top + rise - 4}", "Y = LᵀW", right + 8, top + rise - 16, "start")
    )
    down = top + rise + HIGH
    parts.append(arrow(f"M {left} {down + 3} L {left} {down + 40}", "bytes", left + 8, down + 26, "start"))
    y = top + 3 * rise
    ground = [
        (188, "recipe", "what was asked for"),
        (188, "executors", "processes, Ray"),
        (188, "files", "durable files, locks"),
        (372, "errors, registry, arrays, events", "what every room may use"),
    ]
    x = 10
    for width, name, text in ground:
        parts.append(box("ground", x, y, width, name, text))
        x += width + 8
    height = y + HIGH + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">\n'
        f"<title>The rooms of cospadi in the order of the data</title>\n<style>{STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
