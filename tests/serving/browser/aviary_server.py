"""Tiny models that know a few conversations by heart, so that their replies are certain, and a server of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.serving.served_model import ServedModel
from rollouts.serving.server import bind, make_server
from rollouts.serving.settings import Settings

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {"type": "function", "id": "c", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
MARKDOWN = "A **bold** word and $x^2$.\n\n```python\nprint(1)\n```"


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


CALLING = [*chat("Add 2 and 3"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
BY_HEART: dict[str, list[tuple[list[dict[str, Any]], Any]]] = {
    "parrot": [
        (chat("Hello", "Good morning."), None),
        (chat("Hello", "Good morning.", "And now?", "Now we part."), None),
        (chat("Goodbye", "See you."), None),
        ([{"role": "system", "content": "You are a cat."}, *chat("Hello", "Meow.")], None),
        (chat("Show me", MARKDOWN), None),
        (chat("Sing", "la " * 40), None),
        (CALLING, TOOLS),
        ([*CALLING, {"role": "tool", "content": "5", "tool_call_id": "c"}, *chat("", "The sum is 5.")[1:]], TOOLS),
    ],
    "owl": [(chat("Hello", "Good night."), None)],
}


@dataclass
class Aviary:
    """A running server of several models."""

    url: str
    served: dict[str, ServedModel]


@contextmanager
def serving(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, settings: Settings | None = None
) -> Iterator[Aviary]:
    settings = settings or Settings()
    served = {
        name: ServedModel(name, name, model, tokenizer, settings, max_length=32768, cache_bytes=64 << 20)
        for name, model in models.items()
    }
    ready = threading.Event()
    server = make_server(served, settings, ready.set)
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(20)
            yield Aviary(f"http://127.0.0.1:{listening.getsockname()[1]}", served)
        finally:
            server.should_exit = True
            thread.join()
            for one in served.values():
                one.close()


def learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversations: list[tuple[Any, Any]]) -> None:
    """Train until every reply is nearly certain. A song has no end: its last token is not learned."""
    rows = []
    for messages, tools in conversations:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        if messages[-1]["content"].startswith("la "):
            ids, mask = ids[:-3], mask[:-3]
        rows.append((ids, torch.where(mask, ids, -100)))
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in rows])
    labels = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-100) for _, row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(600):
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.003:
            break
    assert loss < 0.01, "the models have not learned their lines"
    model.eval()
