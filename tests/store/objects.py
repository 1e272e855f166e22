"""Pages whose bytes follow from their key, stores for them, and what lies on the disk."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sglang_ess.store.object_file import ObjectFormat
from sglang_ess.store.page_store import PageStore
from sglang_ess.store.store_directory import OWN_BYTES

PARTS = [1000, 3200, 513, 513, 7]


def page(key, parts=PARTS):
    """The parts of a key's page: arrays of bytes that no other key has."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in parts]


def charged(parts=PARTS):
    """Bytes that an object takes of the limit."""
    return ObjectFormat("any", parts).charged_bytes


@contextmanager
def store(directory, objects=100, identity="model", parts=PARTS, **options):
    """A store for some number of objects, closed at the end."""
    limit_bytes = options.pop("limit_bytes", OWN_BYTES + objects * charged(parts))
    found = PageStore(directory, limit_bytes, identity, parts, **options)
    try:
        yield found
    finally:
        found.close()


def files(directory):
    """The files of all objects."""
    return [path for path in Path(directory, "objects").rglob("*") if path.is_file()]


def used(objects, parts=PARTS):
    """What a store with some number of objects says it uses."""
    return OWN_BYTES + objects * charged(parts)


def disk_bytes(directory):
    """Bytes of all blocks of the store: objects, what is being written, and every folder."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in (".", *names):
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total
