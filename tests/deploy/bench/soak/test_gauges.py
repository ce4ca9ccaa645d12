from __future__ import annotations

from deploy.bench.soak.gauges import levels_of

PAGE = """\
# HELP tessera_a What it is
# TYPE tessera_a gauge
tessera_a{method="x"} 1.0
tessera_a{method="y"} 0.0
# HELP tessera_b What it is
# TYPE tessera_b gauge
tessera_b 0.25
# HELP tessera_c What it is
# TYPE tessera_c gauge
tessera_c 9
"""


def test_the_named_gauges_are_read_with_their_labels() -> None:
    assert levels_of(PAGE, ("tessera_a", "tessera_b")) == {
        "tessera_a x": 1,
        "tessera_a y": 0,
        "tessera_b": 0.25,
    }
