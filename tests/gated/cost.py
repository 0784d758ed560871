"""What approximating one layer costs, in a process of its own."""

import resource
import time

import torch
from torch.nn import functional as F


def cost(d, h, n, fit, extra, out):
    """One layer in a process of its own, whose peak is that of the fit."""
    from tl_bilinear.tensor import GatedLayer, approximate

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    sizes = ((h, d), (h, d), (d, h))
    layer = GatedLayer(*(torch.randn(s, generator=draw) / s[1] ** 0.5 for s in sizes), F.silu)
    x = torch.randn(n, d, generator=draw)
    before = time.process_time()
    approximate(layer, x, fit=fit, extra=extra, warn_below=-1e9, max_bytes=8 * 10**9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.put({"seconds": round(time.process_time() - before, 1), "bytes": peak})
