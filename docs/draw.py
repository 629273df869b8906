"""Draws the pictures of these pages as SVG, readable on light and on dark pages: python docs/draw.py."""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
STYLE = """
  text { fill: #1b1f2a; font: 14px system-ui, sans-serif }
  .small { font-size: 12px } .title { font-weight: 600 }
  .box { fill: #fff; stroke: #7d879c } .page { fill: #fbfbfd; stroke: #d5d8e0 }
  .line { stroke: #7d879c; fill: none; stroke-width: 1.4 } .tip { fill: #7d879c }
  .i { fill: #cfe3ff } .f { fill: #d4f1dc } .g { fill: #ffe7c2 } .o { fill: #ead8fb }
  .c { fill: #ffd9d6 } .h { fill: #dde2ee }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e9f2 }
    .box { fill: #272c39; stroke: #8f9ab3 } .page { fill: #1d212b; stroke: #3c4254 }
    .line { stroke: #9aa4bb } .tip { fill: #9aa4bb }
    .i { fill: #27456e } .f { fill: #245238 } .g { fill: #66491b } .o { fill: #4d3468 }
    .c { fill: #6d302c } .h { fill: #3b4357 }
  }
"""


class Picture:
    """A page of width × height on which shapes are put, the later ones above."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0 8 4 0 8z"/></marker></defs>',
        ]
        self.box(0.5, 0.5, width - 1, height - 1, style="page")

    def box(self, x: float, y: float, width: float, height: float, *lines: str, style: str = "box") -> None:
        """A rectangle around centred lines, of which the first is a title if there are more."""
        self.parts.append(f'<rect class="box {style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        for n, line in enumerate(lines):
            style = "title" if n == 0 and len(lines) > 1 else "small" if n else ""
            self.text(x + width / 2, y + height / 2 + 5 + 17 * (n - (len(lines) - 1) / 2), line, style, "middle")

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def arrow(self, *corners: tuple[float, float], tip: bool = True) -> None:
        """A line from corner to corner."""
        points = " ".join(f"{x},{y}" for x, y in corners)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<polyline class="line" points="{points}"{end}/>')

    def save(self, name: str) -> None:
        (PICTURES / name).write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def draw_num_units() -> None:
    """A layer of three inputs and four units, at one time step."""
    picture = Picture(760, 372, "One step of a layer with input_size = 3 and num_units = 4")
    picture.text(24, 34, "One step of a layer with input_size = 3, num_units = 4", "title")
    for n in range(3):
        picture.box(40, 78 + 30 * n, 30, 30, style="h")
    picture.text(55, 192, "input x", "small", "middle")
    for n in range(4):
        picture.box(40, 216 + 30 * n, 30, 30, style="h")
    picture.text(55, 356, "previous h", "small", "middle")
    bus = 118.0
    picture.arrow((70, 123), (bus, 123), (bus, 98), tip=False)
    picture.arrow((70, 276), (bus, 276), (bus, 302), tip=False)
    picture.arrow((bus, 98), (bus, 302), tip=False)
    for unit in range(4):
        y = 70 + 68 * unit
        picture.arrow((bus, y + 28), (160, y + 28))
        picture.box(162, y, 384, 56)
        for n, (gate, does) in enumerate([("i", "take in"), ("f", "keep"), ("g", "what"), ("o", "show")]):
            picture.box(170 + 66 * n, y + 8, 60, 40, gate, does, style=gate)
        picture.arrow((432, y + 28), (456, y + 28))
        picture.box(458, y + 8, 80, 40, f"c{'₁₂₃₄'[unit]}", "memory", style="c")
        picture.arrow((546, y + 28), (592, y + 28))
        picture.box(594, y + 13, 44, 30, f"h{'₁₂₃₄'[unit]}", style="h")
    picture.text(656, 188, "output h:", "small")
    picture.text(656, 206, "4 numbers, and", "small")
    picture.text(656, 224, "part of the next", "small")
    picture.text(656, 242, "step's input", "small")
    picture.text(162, 356, "each gate: 3 + 4 weights and a bias; 4 units × 4 gates × (3 + 4 + 1) = 128", "small")
    picture.save("num_units.svg")


def draw_call() -> None:
    """The way of a call through the modules."""
    picture = Picture(760, 640, "From what users call to the kernels")
    box, arrow, text = picture.box, picture.arrow, picture.text
    text(24, 32, "what users call", "title")
    box(24, 48, 200, 58, "swap.py", "the class of a module", style="i")
    box(270, 48, 220, 58, "nn.py", "parameters, loop over layers", style="i")
    box(536, 48, 200, 58, "functional.py", "lstm, lstm_cell", style="i")
    arrow((224, 77), (268, 77))
    box(150, 156, 300, 58, "route.py: run(call)", "one table, the first row that applies", style="f")
    arrow((380, 106), (380, 154))
    arrow((570, 106), (570, 172), (452, 172))
    text(510, 166, "tensors", "small", "middle")
    box(24, 268, 200, 58, "torch_op.py", "shapes, derivatives, vmap", style="g")
    box(270, 268, 220, 76, "engines/", "cpu, cuda, numpy, behind one", "Protocol: forward, backward", style="g")
    box(536, 268, 200, 76, "engines/", "composed, stock, onnx:", "in torch's own operations", style="g")
    arrow((190, 214), (124, 266))
    text(84, 236, "something", "small")
    text(84, 250, "watches", "small")
    arrow((350, 214), (350, 266))
    text(360, 236, "nothing", "small")
    text(360, 250, "watches", "small")
    arrow((450, 200), (690, 200), (690, 266))
    text(634, 176, "no kernel, ONNX,", "small")
    text(634, 192, "forward mode", "small")
    arrow((224, 297), (268, 297))
    arrow((620, 106), (620, 242), (470, 242), (470, 266))
    text(612, 236, "NumPy arrays", "small", "end")
    box(24, 396, 200, 58, "engines/in_torch.py", "torch's own operations", style="g")
    box(270, 396, 220, 58, "_native.py → _C", "csrc/bindings.cpp: a list", style="o")
    box(536, 396, 200, 58, "reference.py", "the mathematics in NumPy", style="o")
    arrow((124, 326), (124, 394))
    text(112, 356, "no kernel", "small", "end")
    text(112, 370, "takes it", "small", "end")
    arrow((290, 344), (204, 394))
    text(216, 356, "what cuda", "small", "end")
    text(206, 370, "refuses", "small", "end")
    arrow((380, 344), (380, 394))
    text(390, 374, "cpu, cuda", "small")
    arrow((460, 344), (600, 394))
    text(558, 370, "numpy", "small")
    box(270, 484, 220, 58, "csrc/ops", "check, allocate, fill, launch", style="c")
    arrow((380, 454), (380, 482))
    box(24, 572, 200, 52, "csrc/*/plan.*", "how, and why so", style="h")
    box(270, 572, 220, 52, "csrc/cpu, csrc/cuda", "kernels on plain structs", style="h")
    box(536, 572, 200, 52, "csrc/gate_math.h", "one unit, both ways", style="h")
    arrow((310, 542), (180, 570))
    arrow((380, 542), (380, 570))
    arrow((224, 598), (268, 598))
    arrow((490, 598), (534, 598))
    picture.save("call.svg")


if __name__ == "__main__":
    draw_num_units()
    draw_call()
