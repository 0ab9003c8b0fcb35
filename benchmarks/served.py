"""What fewer visual tokens bring a vLLM that several clients ask at once.

The server is given K rows of random numbers an image, in the very request that `runtime/backends/servers.py` makes:
what it costs does not depend on their values. Encoding and selecting, which a gateway does, are measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.shapes import LLAVA, QUESTION, Shape
from benchmarks.speed import checkpoint_of
from resprune.runtime.backends.http_client import Server
from resprune.runtime.backends.servers import APIS, Question
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import KeptTokens, Picks
from resprune.runtime.sampling import Sampling
from tests.hosts.vllm_host import published, vllm

BUDGETS = (64, 128, 192)
REQUESTS, CONNECTIONS, TOKENS = 16, 4, 8
PREDICTED = {
    "64": {"requests/s": "3 to 5", "first token, p50": "0.15 to 0.3", "first token, p95": "0.15 to 0.35"},
    "128": {
        "requests/s": "2.3 to 3.2",
        "first token, p50": "0.25 to 0.4",
        "first token, p95": "0.25 to 0.45",
    },
    "192": {
        "requests/s": "1.9 to 2.4",
        "first token, p50": "0.35 to 0.5",
        "first token, p95": "0.35 to 0.55",
    },
}
"""Ratios to all 576 tokens, written before the first run: a prompt of K + 30 tokens in place of 606 is 0.16, 0.26 and
0.37 of the prefill's work; what does not shrink is 8 steps of decoding, in batches of up to four, by 2.2 GB of
weights."""


def run(work: Path, shape: Shape = LLAVA) -> dict[str, Any]:
    """Requests a second and seconds to the first token, by K, in one run of the server.

    The K take turns, a request a connection at a time, so that a noisy minute hits all alike; the first turn warms up.
    """
    checkpoint = work / f"{shape.name}-published"
    if not checkpoint.exists():
        published(checkpoint_of(shape, work), checkpoint)
    budgets = [*BUDGETS, shape.num_tokens]
    first: dict[int, list[float]] = {k: [] for k in budgets}
    seconds = dict.fromkeys(budgets, 0.0)
    shuffled = Random(0).sample
    with vllm(
        checkpoint, work / "vllm.log", "--max-num-seqs", str(CONNECTIONS), dtype="bfloat16", context=1024
    ) as running:
        target = Server(running.url, timeout=600)
        for turn in range(1 + REQUESTS // CONNECTIONS):
            for k in shuffled(budgets, len(budgets)):
                bodies = [request(shape, k, turn * CONNECTIONS + number) for number in range(CONNECTIONS)]
                start = perf_counter()
                found = timed(target, bodies)
                if turn:
                    seconds[k] += perf_counter() - start
                    first[k] += found
    return {
        "words": shape.words,
        "predicted": PREDICTED,
        "found": {
            "all" if k == shape.num_tokens else str(k): {
                "requests/s": REQUESTS / seconds[k],
                "first token, p50": float(np.percentile(first[k], 50)),
                "first token, p95": float(np.percentile(first[k], 95)),
            }
            for k in budgets
        },
    }


def request(shape: Shape, k: int, seed: int) -> dict[str, Any]:
    """The body of a question about an image of k rows, as float16 holds them."""
    width = shape.text["hidden_size"]
    rows = np.random.default_rng(seed).standard_normal((k, width)).astype(np.float16).astype(np.float32)
    order = np.arange(k)
    image = KeptTokens(rows, Picks(order, order, np.ones_like(order)), order, (k,), (k,))
    text = {"type": "text", "text": f"{QUESTION} {seed}"}  # no two prompts begin alike
    messages = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = Prompt(messages, "", [], [], [])
    sampling = Sampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    return APIS["vllm"].body(Question(prompt, [image], [], order, sampling, "model"))


def timed(target: Server, bodies: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds to the first token of each request, sent over CONNECTIONS connections."""
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        return list(threads.map(lambda body: first_token(target, body), bodies))


def first_token(target: Server, body: dict[str, Any]) -> float:
    """Seconds until an event has a token; the answer is read to its end, and must have all its tokens."""
    start = perf_counter()
    seconds, tokens = 0.0, 0
    with closing(target.post(APIS["vllm"].path, body)) as exchange:
        exchange.begin()
        for event in exchange.events():
            for choice in event["choices"]:
                if ids := choice.get("token_ids"):
                    seconds = seconds or perf_counter() - start
                    tokens += len(ids)
    assert tokens == TOKENS, f"{tokens} tokens"
    return seconds


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown: ratios to all tokens, found and predicted."""
    whole = result["found"]["all"]
    rows = [
        f"**{result['words']}** in bfloat16 on vLLM's CPU build; {REQUESTS} requests of {TOKENS} tokens over "
        f"{CONNECTIONS} connections, the K in turn. With all tokens: {whole['requests/s']:.3f} requests/s, first token "
        f"{whole['first token, p50']:.1f} s (p50) and {whole['first token, p95']:.1f} s (p95). Below, ratios to that, "
        "in the same run of the server.",
        "",
        "| K | requests/s | predicted | first token, p50 | predicted | first token, p95 | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for k, predicted in result["predicted"].items():
        cells = [
            cell
            for name, wanted in predicted.items()
            for cell in (f"{result['found'][k][name] / whole[name]:.2f}", wanted)
        ]
        rows.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
