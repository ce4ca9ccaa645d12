"""Bars are as long as what they show."""

from __future__ import annotations

from xml.etree import ElementTree

from deploy.bench.plot import TARGET_COLOUR, Bar, Group, draw

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = [
    Group("latency <p50>", (Bar("peer", 1.0, "4 ms"), Bar("ours", 1.5, "2.7 ms")), 1.25),
    Group("throughput", (Bar("peer", 0.5, "5/s"), Bar("ours", 1.0, "10/s")), 2.0),
]


def test_lengths_are_proportional_and_text_is_escaped() -> None:
    root = ElementTree.fromstring(draw(GROUPS, "a machine"))
    _, *bars = root.iter(f"{SVG}rect")
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert [round(width / widths[0], 2) for width in widths] == [1.0, 1.5, 0.5, 1.0]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "latency <p50>" in texts and "2.7 ms  (1.50)" in texts and "a machine" in texts


def test_the_target_is_where_a_bar_of_its_length_would_end() -> None:
    root = ElementTree.fromstring(draw(GROUPS, ""))
    first, *_ = [line for line in root.iter(f"{SVG}line") if line.get("stroke") == TARGET_COLOUR]
    _, bar, *_ = root.iter(f"{SVG}rect")
    end = float(bar.get("x", "0")) + 1.25 * float(bar.get("width", "0"))
    assert abs(float(first.get("x1", "0")) - end) < 0.2


def test_nothing_to_show_is_still_a_picture() -> None:
    assert ElementTree.fromstring(draw([], "nothing")).tag == f"{SVG}svg"
