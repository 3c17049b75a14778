"""Rows of measurements as a benchmark gives them."""

from thresher.evaluation.rows import row


def rows():
    shared = {"task": "synthetic", "model": "tiny", "runtime": "torch", "precision": "fp32", "metric": "accuracy"}
    shared |= {"quality_dense": 70.0, "threads": 1}
    dense, ltp = {"method": "dense", "quality": 70.0}, {"method": "ltp", "quality": 69.25, "target_flops": 0.4}
    ltp |= {"interval_low": -0.25, "interval_high": 1.75, "mode": "pruned", "layout": "packed"}
    padded = dense | {"mode": "dense-padded", "layout": "padded"}
    unpadded = dense | {"mode": "dense-unpadded", "layout": "packed"}
    made = []
    for size, ms in ((1, 20.0), (32, 320.0)):
        for own, speed in ((padded, 0.5), (unpadded, 1.0), (ltp, 2.0)):
            own = own | {"latency_ms_p50": ms / speed, "latency_ms_p95": 2 * ms / speed}
            own |= {"batch_size": size, "samples_per_second": 1000 * size * speed / ms}
            own |= {"speedup_unpadded": speed, "speedup_padded": 2 * speed, "flops_ratio": 1.25 * speed}
            made.append(row(**shared, **own, efficiency=0.8))
    return made
