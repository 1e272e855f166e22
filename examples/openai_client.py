"""The OpenAI client against a server: python examples/openai_client.py [URL] [QUESTION]

Start the server first: sglang-ess serve --model-path out/tiny
Needs: pip install openai (SGLang brings it).
"""

import sys

import openai


def main(url: str = "http://127.0.0.1:30000", question: str = "What is sparse attention?") -> None:
    """Print the streamed answer, then how many of the prompt's tokens were cached."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    for part in stream:
        if part.choices:
            print(part.choices[0].delta.content or "", end="", flush=True)
        if part.usage:
            used = part.usage
            print(f"\n{used.prompt_tokens} prompt tokens, {used.completion_tokens} written")


if __name__ == "__main__":
    main(*sys.argv[1:])
