"""The trained model in an engine: its questions, its answers, and what makes them wrong."""

from benchmarks.serving import recall, recall_changes
from sglang_ess.testing.recall.documents import STOP
from tests.support import switches
from tests.support.engine import EngineProcess

LENGTH, ASKED = 2048, 2  # of a context; questions of each kind about a document
SLOTS = 2 * LENGTH + recall.DRAFT_ROOM
PATCHES = ("tests.support.gather:install", "tests.support.recall:install_changes")


def install_changes() -> None:
    """The benchmark's changes, asleep: EngineProcess.switched(fault=name) wakes one."""
    recall_changes.install(lambda: switches.value("fault"))


def engine(model, **ess) -> EngineProcess:
    """An engine whose slots hold two documents. ess: fields of EssConfig"""
    return EngineProcess(
        model, ess={"admission": "off"} | ess, patches=PATCHES, max_total_tokens=SLOTS,
        kv_cache_dtype="fp8_e4m3", chunked_prefill_size=2048,
    )  # fmt: skip


def documents(count: int, seed: int = 1) -> list:
    return [recall.document_of(seed, LENGTH, number, ASKED) for number in range(count)]


def answers(served: EngineProcess, asked, name: str) -> list[dict]:
    """What benchmarks.serving.recall.rights and same take, one a document.

    A document comes first, then its questions in one batch. name: a new one each time
    """
    found = []
    for number, document in enumerate(asked):
        served.flush()
        text, prompts = recall.tokens_of(document)
        served.together(f"{name} {number}", [text], 1)
        outputs = served.together(
            f"{name} {number} asked", prompts, recall.ANSWER,
            stop_token_ids=list(STOP.encode()), ignore_eos=False,
        )  # fmt: skip
        found.append({"token_ids": [one.token_ids for one in outputs]})
    return found


def changed(found: list[dict], expected: list[dict]) -> list[bool]:
    """Of each question, whether its answer is another one."""
    pairs = zip(found, expected, strict=True)
    return [not same for pair in pairs for same in recall.same(*pair)]


def right(asked, found: list[dict]) -> list[bool]:
    pairs = zip(asked, found, strict=True)
    return [one for pair in pairs for one in recall.rights(*pair)]
