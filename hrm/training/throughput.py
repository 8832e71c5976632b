"""What GPUs can do at best, against which throughput is counted."""

from __future__ import annotations

# Dense bf16 with sums in float32, in TFLOP/s, by the makers' data sheets; the first name that fits counts.
_PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
}


def peak_tflops(device_name: str) -> float | None:
    """What a GPU of that name could do at best, in TFLOP/s of bf16; None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, peak in _PEAK_TFLOPS.items():
        if set(name.split()) <= set(words):
            return peak
    return None
