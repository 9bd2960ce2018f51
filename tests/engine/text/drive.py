"""Jobs, and completions of them as the core would give them, without a core."""

from __future__ import annotations

from typing import Any

from engine.config import ModelSpec
from engine.hf_tokenizer import HFTokenizer
from engine.request import FinishReason, Request
from engine.text import complete, prepare
from headrace.messages import Completion, Job

CONTEXT = 512


def job(**fields: Any) -> Job:
    params = {k: fields.pop(k) for k in list(fields) if k not in Job.model_fields}
    kind = fields.pop("kind", "chat" if "messages" in fields else "completion")
    return Job.build({"run": "r", "lane": "l", "kind": kind, "params": params, **fields})


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def generate(request: Request, ids: list[int]) -> None:
    """What the core does with these sampled ids: stop ids, then the monitor, then max_tokens."""
    for i in ids:
        request.output.append(i)
        enough = len(request.output) > request.sampling.min_tokens
        if i in request.sampling.stop_token_ids and enough:
            request.finish = FinishReason.STOP
            return
        if request.monitor and request.monitor.push(i):
            request.finish = FinishReason.STOP
            return
    request.finish = FinishReason.LENGTH


def answer(j: Job, tokenizer: HFTokenizer | None, spec: ModelSpec, *outputs: list[int]) -> Completion:
    prepared = prepare(j, tokenizer, spec, CONTEXT)
    for request, ids in zip(prepared.requests, outputs, strict=True):
        generate(request, ids)
    done = complete(j, prepared, tokenizer, engine="e", model="m", attempts=2)
    return Completion.parse(done.to_bytes())
