"""SGLang's options for speculative decoding, with `width` queries a request and step."""


def eagle(width: int) -> dict:
    return dict(
        speculative_algorithm="EAGLE", speculative_eagle_topk=1, speculative_num_steps=width - 1,
        speculative_num_draft_tokens=width,
    )  # fmt: skip


def ngram(width: int) -> dict:
    return dict(
        speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1,
        speculative_num_draft_tokens=width,
    )  # fmt: skip
