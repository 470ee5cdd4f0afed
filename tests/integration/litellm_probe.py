"""LiteLLM against a gateway, as a process of its own: it patches, warns and leaves connections open. Prints JSON.

python litellm_probe.py URL KEY
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

HELLO = [{"role": "user", "content": "Hello there, engine"}]


def main(url: str, key: str) -> None:
    told: dict[str, Any] = {}
    openai: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": key, "num_retries": 0}
    whole = litellm.completion(model="openai/chat", messages=HELLO, max_tokens=4, **openai)
    told["whole"] = [whole.choices[0].message.content, whole.usage.completion_tokens]
    stream = litellm.completion(model="openai/chat", messages=HELLO, max_tokens=4, stream=True, **openai)
    told["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    vectors = litellm.embedding(model="openai/pool", input=["a", "b"], **openai)
    told["embedding"] = [len(row["embedding"]) for row in vectors.data]
    message = litellm.completion(
        model="anthropic/chat", messages=HELLO, max_tokens=4, api_base=url, api_key=key, num_retries=0
    )
    told["anthropic"] = message.choices[0].message.content
    long = [{"role": "user", "content": "word " * 9000}]
    for name, model, messages in (("unknown", "openai/never-was", HELLO), ("long", "openai/chat", long)):
        try:
            litellm.completion(model=model, messages=messages, **openai)
        except (litellm.NotFoundError, litellm.BadRequestError) as error:
            told[name] = type(error).__name__
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
