"""Times work on a CUDA device by its own clock.  Knows nothing of what it times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

READ_BYTES_PER_S = 4.205e12  # of one H200, read only, measured (component_ceilings_h200)
BF16_FLOP_PER_S = 790e12  # of one H200: a product of 8192 x 8192 x 8192 random numbers
WARM_UPS = 2


def seconds(launches: Sequence[Callable[[], object]], graph: bool = True, repeats: int = 7) -> float:
    """Median time of one launch where all run in turn, as one CUDA graph if asked.

    They run once before, which compiles what is to be compiled.
    """
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    run = _captured(launches) if graph else lambda: [launch() for launch in launches]
    times: list[float] = []
    for _ in range(WARM_UPS + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[WARM_UPS:]) / len(launches)


def seconds_or_none(
    launches: Sequence[Callable[[], object]], graph: bool = True, repeats: int = 7
) -> float | None:
    """None where a Triton kernel among them does not fit the GPU."""
    # Imported here: the exception's class is all that is needed of Triton.
    from triton.runtime.errors import OutOfResources

    try:
        return seconds(launches, graph, repeats)
    except OutOfResources:
        return None


def _captured(launches: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph.replay
