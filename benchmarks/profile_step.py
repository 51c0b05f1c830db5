"""Where the time of a step goes: the operators that take most of it, by their own time on the CPU or their kernels'."""

from collections.abc import Sequence
from typing import Any

import torch
from cases import Contender


def where_time_goes(contender: Contender, inputs: Sequence[Any], device: str, most: int = 12) -> dict[str, Any]:
    """Profile one call.

    Returns:
        The contender's name, and per operator its calls and its share of the time, largest first.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    contender.run(*inputs)
    with torch.profiler.profile(activities=activities) as profiler:
        contender.run(*inputs)
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # A kernel has an event of its own, and its time counts for the operator that launched it too.
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1.0
    rows = [{"what": e.key, "calls": e.count, "share": getattr(e, key) / total} for e in events[:most]]
    return {"name": contender.name, "operators": [r for r in rows if r["share"] >= 0.005]}
