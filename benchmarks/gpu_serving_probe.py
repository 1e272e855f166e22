"""The card's own counters while a benchmark runs: PCIe bytes and how busy it was, by NVML.

GPM (Hopper and newer) counts between any two samples; elsewhere NVML's older calls give what
they saw in the last 20 ms (PCIe) or about the last sixth of a second (busy). Figures are of the
whole card. What a card or its driver does not give is None, and `reason` says why.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from types import ModuleType
from typing import Any

MIB = 2**20
SAMPLE_SECONDS = 0.025
# Shorter than this a difference of two samples says little.
MIN_SECONDS = 0.06
FIGURES = ("pcie", "pcie_out", "gpu_busy", "sm_busy")


class Probe:
    """Samples one card in a thread of its own, inside sampling().

    figures between two times: pcie to the card and pcie_out of it in GB/s, gpu_busy (something
    ran) and sm_busy (share of multiprocessors that had work) in [0, 1]
    kind: "gpm", "legacy" or None, with the reason; facts: of the card, for the report
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
        except Exception as error:  # NVMLError needs the library that may be missing
            self.reason = f"NVML must open card {index}: got {_said(error)}"
            return
        self.facts = self._facts()
        self.kind = "gpm" if self._has_gpm() else "legacy"

    def _facts(self) -> dict[str, Any]:
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return {
            "gpu": _text(self._ask("nvmlDeviceGetName")),
            "driver": _text(self._ask("nvmlSystemGetDriverVersion", of_device=False)),
            "gpu_memory_bytes": memory and int(memory.total),
            "gpu_free_bytes": memory and int(memory.free),
            "pcie_generation": self._ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": self._ask("nvmlDeviceGetCurrPcieLinkWidth"),
            "power_limit_mw": self._ask("nvmlDeviceGetEnforcedPowerLimit"),
        }

    def _ask(self, name: str, *args: Any, of_device: bool = True) -> Any:
        """What a call gives, or None where it gives nothing."""
        try:
            call = getattr(self._nvml, name)
            return call(self._device, *args) if of_device else call(*args)
        except Exception:
            return None

    def _has_gpm(self) -> bool:
        support = self._ask("nvmlGpmQueryDeviceSupport")
        if support is None or not support.isSupportedDevice:
            return False
        try:
            self._nvml.nvmlGpmSampleFree(self._gpm_sample())
        except Exception as error:
            self.reason = f"GPM must give samples: got {_said(error)}"
            return False
        return True

    def _gpm_sample(self) -> Any:
        return self._nvml.nvmlGpmSampleGet(self._device, self._nvml.nvmlGpmSampleAlloc())

    def _legacy_sample(self) -> dict[str, float | None]:
        """PCIe calls wait 20 ms each."""
        rates = [
            self._ask("nvmlDeviceGetPcieThroughput", getattr(self._nvml, name))
            for name in ("NVML_PCIE_UTIL_RX_BYTES", "NVML_PCIE_UTIL_TX_BYTES")
        ]
        busy = self._ask("nvmlDeviceGetUtilizationRates")
        inward, outward = (None if rate is None else rate * 1024 / 1e9 for rate in rates)
        gpu = None if busy is None else busy.gpu / 100
        return {"pcie": inward, "pcie_out": outward, "gpu_busy": gpu, "sm_busy": None}

    # --- sampling -----------------------------------------------------------------------

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Samples inside; between() answers until the next one begins."""
        self._forget()
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
        take = self._gpm_sample if self.kind == "gpm" else self._legacy_sample
        while True:
            try:
                sample = take()
            except Exception as error:
                self._failed = _said(error)
                return
            self._samples.append((time.perf_counter(), sample))
            if ended.wait(SAMPLE_SECONDS):
                return

    def _forget(self) -> None:
        samples, self._samples, self._failed = self._samples, [], None
        if self.kind == "gpm":
            for _, sample in samples:
                self._nvml.nvmlGpmSampleFree(sample)

    def between(self, start: float, end: float) -> dict[str, float | None]:
        """FIGURES of the samples from start to end (perf_counter's seconds)."""
        inside = [(at, sample) for at, sample in self._samples if start <= at <= end]
        self._short = not inside or inside[-1][0] - inside[0][0] < MIN_SECONDS
        if self._short:
            return dict.fromkeys(FIGURES)
        if self.kind == "gpm":
            return self._gpm_figures(inside[0][1], inside[-1][1])
        found = {}
        for name in FIGURES:
            values = [sample[name] for _, sample in inside if sample[name] is not None]
            found[name] = fmean(values) if values else None
        return found

    def why_none(self) -> str:
        """For a figure that the last between() could not give."""
        if self._short and self.kind is not None:
            return self._failed or "windows too short for two samples of the card"
        return self._failed or self.reason or f"the card's {self.kind} counters do not give it"

    def _gpm_figures(self, first: Any, last: Any) -> dict[str, float | None]:
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
            self._failed = _said(error)
            return dict.fromkeys(FIGURES)
        return {
            name: request.metrics[place].value * factor
            if request.metrics[place].nvmlReturn == 0
            else None
            for place, (name, (_, factor)) in enumerate(zip(FIGURES, metrics, strict=True))
        }


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")
