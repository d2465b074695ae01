"""Records as ``effvit profile`` and ``effvit visualize`` write them, with made-up numbers."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any

from PIL import Image


def made_up_model(name: str, method: str | None, speedup: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "host": None if method is None else "host_a",
        "method": method,
        "settings": {},
        "parameters": 5_000_000,
        "macs": int(2e9 / speedup),
        "uncounted": {},
        "tokens": [16.0, 16.0 / speedup],
        "images_per_second": 100 * speedup,
        "latency": {"p10": 0.01, "p50": 0.04 / speedup, "p90": 0.05, "p99": 0.06},
        "peak_memory": 50_000_000,
        "speedup": speedup,
        "interval": [speedup - 0.1, speedup + 0.1] if method else [1.0, 1.0],
        "resolved": speedup > 1.1,
        "mac_ratio": speedup,
        "ideal_speedup": 1.1 * speedup if method else None,
        "efficiency": 0.91 if method else None,
        "efficiency_interval": [0.85, 0.97] if method else None,
        "breakdown": [
            {"block": 0, "seconds": {"attention": 0.01, "mlp": 0.02}},
            {"block": "rest", "seconds": {"x": 0.01}},
        ],
        "seconds": [0.04] * 3,
        "accuracy": None,
        "fidelity": {"divergence": speedup / 10, "feature_distance": 0.1, "images": 2} if method else None,
        **changes,
    }


def made_up_profile(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "profile",
        "machine": {
            "processor": "a </script> processor",
            "cores": 2,
            "device": "cpu",
            "system": "Linux",
            "python": "3",
            "torch": "2",
            "timm": "1",
            "effvit": "0",
        },
        "conditions": {
            "batch_size": 4,
            "input_size": [3, 64, 64],
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "compile": False,
            "cuda_graphs": False,
            "clock": "wall",
            "images": ["one", "two"],
        },
        "models": [
            made_up_model("host_a", None, 1.0),
            made_up_model("evit keep_rate=0.5", "evit", 1.8),
            made_up_model("tome r=8", "tome", 1.05),
        ],
        **changes,
    }


def made_up_evaluation(**changes: Any) -> dict[str, Any]:
    """As ``effvit evaluate`` writes it without a measurement of speed."""
    dense = {
        "name": "host_a",
        "host": None,
        "method": None,
        "settings": {},
        "parameters": 5_000_000,
        "macs": 2_000_000_000,
        "mac_ratio": 1.0,
        "tokens": [16.0, 16.0],
        "accuracy": {"value": 80.0, "metric": "top-1", "data": "a set", "origin": "made up", "images": 1600},
    }
    reduced = {
        "name": "tome r=8",
        "host": "host_a",
        "method": "tome",
        "settings": {"r": 8},
        "macs": 1_000_000_000,
        "mac_ratio": 2.0,
        "tokens": [16.0, 8.0],
        "accuracy": {**dense["accuracy"], "value": 75.0},
        "published": {"value": 76.5, "data": "a set", "source": "a <made-up> paper"},
        "object_patches": {"tokens": [1.0, 0.5], "represented": [1.0, 1.0], "images": 100},
        "consistency": {"shifts": [1, 2], "same": [0.9, 0.8], "images": 100},
    }
    return {
        "schema": 1,
        "kind": "accuracy",
        "machine": made_up_profile()["machine"],
        "conditions": {"batch_size": 4, "input_size": [3, 64, 64], "device": "cpu", "dtype": "float32"},
        "models": [dense, {**dense, **reduced}],
        **changes,
    }


def made_up_tokens(**changes: Any) -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (32, 16), (200, 100, 0)).save(file, "PNG")
    return {
        "schema": 1,
        "kind": "tokens",
        "model": "tome r=8",
        "host": "host_a",
        "method": "tome",
        "settings": {"r": 8},
        "name": "orange",
        "note": "made up",
        "picture": "data:image/png;base64," + b64encode(file.getvalue()).decode(),
        "stages": [
            {"block": 0, "tokens": 7, "labels": [[0, 1, 2, 3], [4, 5, 6, 6]], "fused": [], "soft": False},
            {"block": 1, "tokens": 2, "labels": [[0, 1, 1, -1], [0, 1, 1, -1]], "fused": [0], "soft": False},
        ],
        **changes,
    }


def made_up_choices() -> dict[str, Any]:
    """An evaluation as ``tools/measure_choices.py`` writes it: two methods, of which the second loses to a control."""
    dense, reduced = made_up_evaluation()["models"]
    kept = {"object_patches": {"tokens": [1.0, 0.25], "represented": [1.0, 1.0], "images": 100}}
    stays = {"consistency": {"shifts": [1, 2], "same": [0.9, 0.825], "images": 100}}
    del reduced["published"], reduced["object_patches"], reduced["consistency"]

    def model(name: str, method: str | None, value: float, **further: Any) -> dict[str, Any]:
        host = None if method is None else dense["name"]
        own = {"name": name, "method": method, "host": host, "settings": {}}
        return {**reduced, **own, "accuracy": {**dense["accuracy"], "value": value}, **further}

    models = [
        {**dense, **stays},
        model("tome r=8", "tome", 75.0, **kept, **stays),
        model("tome r=8, control random, seed 0", "random", 70.0, **kept),
        model("tome r=8, control random, seed 1", "random", 71.0, **kept),
        model("tome r=8, control uniform", "uniform", 74.0, **kept),
        model("tome r=8, control resolution", None, 60.0),
        model("evit keep_rate=0.5", "evit", 65.0, **stays),
        model("evit keep_rate=0.5, control random, seed 0", "random", 66.0),
        model("evit keep_rate=0.5, control random, seed 1", "random", 63.0),
        model("evit keep_rate=0.5, control uniform", "uniform", 65.0),
    ]
    return made_up_evaluation(models=models)
