"""save: a decode step's new rows of every layer, stored into the host tier by their slots."""

from __future__ import annotations

import torch

from benchmarks.kernels.points import POISON, Run, as_bytes, make_rows, row_bytes_of
from benchmarks.kernels.timing import Subject, require
from ess_kernels.scatter import scatter_rows


def measure_save(run: Run) -> None:
    """Direct stores into the host tier, in a graph."""
    layers = run.sizes.layers
    for batch in run.sizes.batches:
        row_bytes = row_bytes_of(run.host)
        config = {"system": "triton", "batch": batch, "layers": layers, "row_bytes": row_bytes}
        run.bench.begin(f"save {config}")
        run.bench.time("save", config, lambda n=batch: _subject(run, n))


def _subject(run: Run, batch: int) -> Subject:
    layers, device = run.sizes.layers, run.bench.device
    generator = torch.Generator(device).manual_seed(run.seed)
    per_layer = len(run.host) // layers
    hosts = [run.host[i * per_layer : (i + 1) * per_layer] for i in range(layers)]
    new = make_rows(layers * batch, row_bytes_of(run.host), device, generator)
    new = new.view(layers, batch, -1)
    slots = torch.randperm(per_layer, generator=generator, device=device)[:batch]
    places = slots.cpu()

    def save_all():
        for host, rows in zip(hosts, new, strict=True):
            scatter_rows(rows, slots, host)

    def poison():
        for host in hosts:
            as_bytes(host)[places] = POISON

    def check(_last):
        for host, rows in zip(hosts, new.cpu(), strict=True):
            require(torch.equal(as_bytes(host[places]), as_bytes(rows)), "a saved row differs")

    return Subject([save_all], poison, check, layers * batch * row_bytes_of(run.host))
