"""Ask a server that `resprune serve build/demo-k16` has started, with OpenAI's client (`pip install openai`).

python examples/openai_client.py http://127.0.0.1:8080/v1 demo/pictures/shapes.png "What color is the large square?"
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI


def main(url: str, image: str, question: str) -> None:
    client = OpenAI(base_url=url, api_key="none")  # or the server's RESPRUNE_SERVE_KEY
    model = client.models.list().data[0].id
    data = base64.b64encode(Path(image).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        stream=True,
        extra_body={"resprune": {"tokens": 8}},  # what OpenAI's API has no word for
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
