"""The recall model's network against transformers, its documents, and its training."""

import json
import random

import numpy as np
import pytest
import torch

from sglang_ess.testing import train
from sglang_ess.testing.recall import SHAPE, documents, measure, network
from sglang_ess.testing.recall.model import WEIGHTS, write_recall_model
from sglang_ess.testing.recall.network import Network, Selection
from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE
from tests.support.oracle import Decisions, Oracle
from tests.support.parity import one_thread

K = SHAPE.index_topk
PAD = TOKEN_IDS["pad_token_id"]
CLOSE = 1e-4  # of the largest logprob; a score may be below the k-th best by this share of the best
MANY, FEW = 320, 100  # tokens; FEW are all selected


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Two threads of small operators wait for each other where another process has a core."""
    with one_thread():
        yield


# Against transformers.


class Pair:
    """One checkpoint as Network and in transformers, both in float32."""

    def __init__(self, directory, weights=None):
        if weights is None:
            torch.manual_seed(0)
            weights = directory / "drawn.safetensors"
            train.write_tensors(Network(SHAPE, VOCAB_SIZE), weights)
        path = write_recall_model(directory / "model", weights)
        self.oracle = Oracle(path)
        self.network = measure.load_network(path / "model.safetensors")

    def logits(self, ids) -> torch.Tensor:
        """[length, vocabulary] of transformers, with its own selections."""
        with torch.no_grad():
            return self.oracle.model(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def run(net: Network, ids, selection) -> tuple[torch.Tensor, dict]:
    """Logits [length, vocabulary], and what each layer selected: {layer: {query: positions}}."""
    chosen = {}

    def recording(layer, select):
        def call(*args):
            mask = select(*args)
            chosen[layer] = {q: np.flatnonzero(row) for q, row in enumerate(mask[0, 0].numpy())}
            return mask

        return call

    layers = net.model["layers"]
    for number, layer in enumerate(layers):
        layer.self_attn._selected = recording(number, layer.self_attn._selected)
    try:
        step = net.step(torch.arange(len(ids))[None], selection=selection)
        return net.lm_head(net.hidden(torch.tensor([ids]), step))[0], chosen
    finally:
        for layer in layers:
            del layer.self_attn._selected


def selected_wrongly(chosen, scores) -> float:
    """By how much the worst selected position is below the k-th best score, in shares of the best.

    Positions whose scores are equal may replace each other: many scores are 0, of keys that no
    head matches. inf: a query selected another number of positions.
    """
    worst = 0.0
    for layer, queries in chosen.items():
        for query, positions in queries.items():
            seen = scores[layer][query, : query + 1]
            count = min(K, query + 1)
            if len(positions) != count:
                return np.inf
            limit = seen.topk(count).values[-1]
            below = (limit - seen[torch.from_numpy(positions)]).max() / seen.abs().max()
            worst = max(worst, float(below))
    return worst


def distance(pair: Pair, net: Network, ids) -> float:
    """Of the network's logprobs from those of transformers with the network's selections, as a
    share of the largest; or selected_wrongly(), if that is more.
    """
    logits, chosen = run(net, ids, Selection(K))
    verdict = pair.oracle.judge(ids, Decisions(selection=chosen))
    wanted = torch.tensor(ids[1:])[:, None]
    ours = torch.log_softmax(logits[:-1], -1).gather(1, wanted)[:, 0].numpy()
    apart = np.abs(ours - verdict.logprobs).max() / np.abs(verdict.logprobs).max()
    return max(float(apart), selected_wrongly(chosen, verdict.scores))


def ids_of(length: int) -> list[int]:
    document = documents.make_document(random.Random(3), max(length, 400), ("code", "hop"))
    question = document.questions[0]
    return list((document.text + question.prompt + question.answer).encode())[-length:]


@pytest.fixture(scope="module", params=[None, *[WEIGHTS] * WEIGHTS.is_file()], ids=str)
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("recall"), request.param)


def test_few_tokens_give_the_logits_of_transformers(pair):
    """Every position is selected, so there is no choice to make."""
    ids = ids_of(FEW)
    expected, largest = pair.logits(ids), float(pair.logits(ids).abs().max())
    for selection in None, Selection(K):
        logits, _ = run(pair.network, ids, selection)
        assert float((logits - expected).abs().max()) < CLOSE * largest


def test_many_tokens_give_its_logprobs_and_selections(pair):
    assert distance(pair, pair.network, ids_of(MANY)) < CLOSE


@pytest.mark.parametrize("corruption", ["scale", "indexer_pairs", "index_gates", "one_less"])
def test_a_corruption_is_caught(pair, corruption, monkeypatch):
    attention = pair.network.model["layers"][2].self_attn
    if corruption == "scale":
        monkeypatch.setattr(attention, "scale", attention.scale * 1.05)
    elif corruption == "indexer_pairs":  # rotated as attention's
        monkeypatch.setattr(network, "_rotate_halves", rotate_as_attention)
    elif corruption == "index_gates":  # a head's weight is another's
        gates = attention.indexer.weights_proj.weight.data
        monkeypatch.setattr(attention.indexer.weights_proj.weight, "data", gates.roll(1, 0))
    else:
        _, chosen = run(pair.network, ids_of(MANY), Selection(K - 1))
        scores = {layer: torch.zeros(MANY, MANY) for layer in chosen}
        assert selected_wrongly(chosen, scores) == np.inf
        return
    assert distance(pair, pair.network, ids_of(MANY)) > 10 * CLOSE


def rotate_as_attention(x, cos, sin):
    turned = network._rotate_pairs(x[..., : network.ROPE], cos, sin)
    return torch.cat([turned, x[..., network.ROPE :].to(turned.dtype)], -1)


# Documents.


def document(seed, length=2048, kinds=documents.KINDS, **options):
    return documents.make_document(random.Random(seed), length, kinds, **options)


def test_a_seed_gives_one_document():
    assert document(1) == document(1) != document(2)


@pytest.mark.parametrize("length", [1024, 4096, 16000])
def test_answers_are_in_the_text(length):
    for seed in range(8):
        made = document(seed, length, others=length // 200)
        assert abs(len(made.text) - length) <= 2 and made.text.isascii()
        for question in made.questions:
            assert made.text.count(question.value) >= 1
            assert question.is_right(question.answer) and not question.is_right(" no\n")
            wrong = question.answer.replace(question.value[-1], "#")
            assert not question.is_right(wrong)
            assert question.answer.count(documents.STOP) == 1


def test_a_hop_leads_from_one_fact_to_the_other():
    made = document(4, kinds=("hop",))
    leads, says = made.questions[0].answer.strip().split(". ")
    assert f"{leads}." in made.text and says in made.text
    assert leads.split()[-1] == says.split()[3]  # keeper of A is B; code of B is C


@pytest.mark.parametrize("depth", [0.05, 0.5, 0.95])
def test_facts_are_as_deep_as_asked(depth):
    """Quotes less so: they need a line without a run of spaces, and the text has long tables."""
    for seed in range(8):
        for question in document(seed, 16000, depth=depth).questions:
            assert abs(question.depth - depth) < (0.3 if question.kind == "quote" else 0.01)


def test_what_is_asked_has_one_answer():
    """But for one name in 50 that is drawn twice."""
    says = {"code": "The code of {} is", "hop": "The keeper of {} is", "quote": "{}"}
    asks = {"code": "code of ", "hop": "keeper of ", "quote": 'follows "'}
    found = dict.fromkeys(says, 0)
    for seed in range(60):
        made = document(seed, 16000, others=80)
        for kind, prompt, *_ in made.questions:
            about = prompt.rpartition(asks[kind])[2].removesuffix("?\nA:").removesuffix('"')
            count = made.text.count(says[kind].format(about))
            assert count >= 1
            found[kind] += count > 1
    assert max(found.values()) <= 60 / 50 and found["quote"] == 0


def test_the_bytes_before_it_tell_each_byte_of_a_quote():
    """A model that matches them can copy it; and no two quotes of a document share a byte."""
    size, head = documents.CONTEXT_BYTES, documents.HEAD_BYTES
    for seed in range(4):
        made = document(seed, 14_336, ("quote",) * 8, others=70)
        places = []
        for question in made.questions:
            passage = question.answer[2:-2]
            places.append(made.text.index(passage))
            for at in range(head, len(passage)):
                before = passage[at - size : at]
                nexts = made.text.split(before)[1:]
                assert nexts and {after[:1] for after in nexts} == {passage[at]}
        places.sort()
        assert min(np.diff(places)) >= head + documents.QUOTE_BYTES


def test_tests_see_no_text_of_training():
    trained, held_out = documents.texts()
    made = [document(1, kinds=(), others=0, trained=trains) for trains in (True, False)]
    parts = [one.text[-1000:-100] for one in made]
    assert parts[0] in trained and parts[1] in held_out and parts[1] not in trained


def test_a_document_without_room_is_refused():
    with pytest.raises(ValueError, match="beside 3 facts: got 150, which leaves"):
        documents.make_document(random.Random(0), 150, ("code",))


@pytest.mark.parametrize("length", [200, 513, 1025])
def test_samples(length):
    """Weights are of whole answers; positions grow, and jump between lines only."""
    jumped = 0
    for seed in range(20):
        one = documents.sample(random.Random(seed), length, SHAPE.context, PAD)
        assert len(one.ids) == len(one.weights) == len(one.positions) == length
        assert set(np.unique(one.weights).tolist()) <= {0.0, np.float32(0.1).item(), 1.0}
        assert np.array_equal(one.weights == 0, one.ids == PAD)
        text = bytes(one.ids[one.ids != PAD].tolist()).decode()
        learned = bytes(one.ids[one.weights == 1].tolist()).decode()
        answers = [part.partition("\nA:")[2] for part in text.split("\nQ: ")[1:]]
        assert learned == "".join(answers) and len(answers) >= 1
        steps = np.diff(one.positions)
        assert one.positions[0] >= 0 and one.positions[-1] < SHAPE.context and steps.min() >= 1
        assert set(one.ids[:-1][steps > 1].tolist()) <= {ord("\n")}
        jumped += bool(steps.max() > 1)
    assert jumped >= 15


# Training.


@pytest.fixture
def small(monkeypatch):
    """A plan of four short steps, saved after the second and the last."""
    plan = (
        train.Stage(1, 200, 1),
        train.Stage(2, 200, 1, sparse=True),
        train.Stage(1, 200, 1, "draft"),
    )
    settings = dict(MEASURED_DOCUMENTS=1, MEASURED_LENGTH=600, SAVE_STEPS=2, REPORT_STEPS=1)
    for name, value in (settings | {"STAGES": plan}).items():
        monkeypatch.setattr(train, name, value)


def losses(lines):
    return [[line[key] for key in ("step", "answers", "text", "indexers")] for line in lines]


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(small, tmp_path):
    whole = losses(train.train(train.Training(0, 1.0), tmp_path))
    stopped, lines = train.Training(0, 1.0), []
    for line in train.train(stopped, tmp_path):
        lines.append(line)
        if line["step"] == 2:
            break
    again = train.Training(0, 1.0)
    again.load(tmp_path / "training.pt")
    assert again.done == 2
    assert losses(lines + list(train.train(again, tmp_path))) == whole


def test_another_seed_is_refused(small, tmp_path, capsys):
    train.Training(0, 1.0).save(tmp_path / "training.pt")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--seed", "1"])
    assert "--seed and --share must be (0, 1.0)" in capsys.readouterr().err


def test_the_command_writes_a_checkpoint_a_log_and_a_picture(small, tmp_path):
    assert train.main(["--out", str(tmp_path)]) == 0
    path = write_recall_model(tmp_path / "model", tmp_path / "model.safetensors")
    assert measure.load_network(path / "model.safetensors").config == SHAPE
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and "recall" in lines[-1]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_short_training_finds_facts(tmp_path):
    """Minutes instead of an hour: most codes of documents of 1K, none of them seen before."""
    training = train.Training(0, 0.4)
    for _ in train.train(training, tmp_path):
        pass
    found = measure.answers(training.network, 1024, 4, Selection(K), seed=1)
    assert measure.recall(found, "code") >= 0.5
