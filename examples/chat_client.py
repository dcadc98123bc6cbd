"""Ask a server: ``python -m examples.chat_client QUESTION [ADDRESS]``.

The server is ``vllm serve CHECKPOINT --quantization qamw``; ``openai`` comes with vLLM.
"""

import sys

from openai import OpenAI


def main(question: str, address: str = "http://localhost:8000") -> None:
    """Print the answer as it arrives."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
