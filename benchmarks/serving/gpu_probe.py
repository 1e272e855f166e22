"""The card's own counters while a benchmark runs: PCIe bytes and how busy it was, by NVML's GPM.

GPM (Hopper and newer) counts between any two samples, for the whole card. A figure that a card or
its driver does not give is None, and `reason` says why.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from sglang_ess.layout import MIB

SAMPLE_SECONDS = 0.025
MIN_SECONDS = 0.06  # the difference of two samples closer than this says little
FIGURES = ("pcie", "pcie_out", "gpu_busy", "sm_busy")


class Probe:
    """Samples one card in a thread of its own, inside sampling().

    Figures between two times: pcie to the card and pcie_out of it in GB/s, gpu_busy (something
    ran) and sm_busy (share of multiprocessors that had work) in [0, 1].
    kind: "gpm", or None with the reason; facts: of the card, for the report
    """

    def __init__(self, nvml: ModuleType | Any | None = None, index: int = 0):
        self.kind: str | None = None
        self.reason: str | None = None
        self.facts: dict[str, Any] = {}
        self._samples: list[tuple[float, Any]] = []
        self._failed: str | None = None
        self._short = False
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._device = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as error:  # NVMLError needs the library, which may be missing
            self.reason = f"NVML must open card {index}: got {_line(error)}"
            return
        self.facts = self._facts()
        try:
            self._nvml.nvmlGpmSampleFree(self._take())
            self.kind = "gpm"
        except Exception as error:
            self.reason = f"GPM must give samples: got {_line(error)}"

    def _facts(self) -> dict[str, Any]:
        nvml = self._nvml

        def ask(name: str, *args: Any) -> Any:
            try:
                found = getattr(nvml, name)(*args)
            except Exception:
                return None
            return found.decode() if isinstance(found, bytes) else found

        memory = ask("nvmlDeviceGetMemoryInfo", self._device)
        return {
            "gpu": ask("nvmlDeviceGetName", self._device),
            "driver": ask("nvmlSystemGetDriverVersion"),
            "gpu_memory_bytes": memory and int(memory.total),
            "pcie_generation": ask("nvmlDeviceGetCurrPcieLinkGeneration", self._device),
            "pcie_width": ask("nvmlDeviceGetCurrPcieLinkWidth", self._device),
            "power_limit_mw": ask("nvmlDeviceGetEnforcedPowerLimit", self._device),
        }

    def _take(self) -> Any:
        return self._nvml.nvmlGpmSampleGet(self._device, self._nvml.nvmlGpmSampleAlloc())

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Samples inside; between() answers until the next sampling() begins."""
        samples, self._samples, self._failed = self._samples, [], None
        for _, sample in samples:
            self._nvml.nvmlGpmSampleFree(sample)
        if self.kind is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._sample, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _sample(self, ended: threading.Event) -> None:
        while True:
            try:
                sample = self._take()
            except Exception as error:
                self._failed = _line(error)
                return
            self._samples.append((time.perf_counter(), sample))
            if ended.wait(SAMPLE_SECONDS):
                return

    def between(self, start: float, end: float) -> dict[str, float | None]:
        """FIGURES of the samples from start to end (perf_counter's seconds)."""
        inside = [(at, sample) for at, sample in self._samples if start <= at <= end]
        self._short = not inside or inside[-1][0] - inside[0][0] < MIN_SECONDS
        if self._short:
            return dict.fromkeys(FIGURES)
        return self._figures(inside[0][1], inside[-1][1])

    def why_none(self) -> str:
        """Why the last between() could not give a figure."""
        if self._short and self.kind is not None:
            return self._failed or "windows too short for two samples of the card"
        return self._failed or self.reason or "the card's counters do not give it"

    def _figures(self, first: Any, last: Any) -> dict[str, float | None]:
        nvml = self._nvml
        metrics = (
            (nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, MIB / 1e9),
            (nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, MIB / 1e9),
            (nvml.NVML_GPM_METRIC_GRAPHICS_UTIL, 0.01),
            (nvml.NVML_GPM_METRIC_SM_UTIL, 0.01),
        )
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(metrics)
        request.sample1, request.sample2 = first, last
        for place, (metric, _) in enumerate(metrics):
            request.metrics[place].metricId = metric
        try:
            nvml.nvmlGpmMetricsGet(request)
        except Exception as error:
            self._failed = _line(error)
            return dict.fromkeys(FIGURES)
        found = zip(FIGURES, metrics, request.metrics, strict=False)
        return {
            name: metric.value * factor if metric.nvmlReturn == 0 else None
            for name, (_, factor), metric in found
        }


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")
