"""One completion -> one OpenAI batch output line, as plain data.

Pure functions. A row that ended ok carries the endpoint's own object (`chat.completion`,
`text_completion`, or `score` for log-likelihoods); any other row carries `error` and no response.
Shapes: OpenAI's openapi.yaml of August 2026 (BatchRequestOutput, CreateChatCompletionResponse,
CreateCompletionResponse); `token_ids`, `prompt_token_ids`, `prompt_logprobs` and `stop_reason` stand
where vLLM puts them.
"""

from __future__ import annotations

from typing import Any

from headrace.messages import Choice, Completion, Kind, Status, TokenLogprob

#: JSON has no minus infinity; vLLM and OpenAI write this instead.
LOWEST_LOGPROB = -9999.0
#: OpenAI's code of rows that never ran, by how they ended.
_CODES = {Status.EXPIRED: "batch_expired", Status.CANCELLED: "batch_cancelled", Status.DEAD: "dead"}


def batch_line(completion: Completion) -> dict[str, Any]:
    """The output line; `custom_id` is the row's own, or the job's id for jobs that came without one."""
    ok = completion.status is Status.OK
    return {
        "id": f"batch_req_{completion.id}",
        "custom_id": completion.meta.get("custom_id", completion.id),
        "response": {"status_code": 200, "request_id": completion.id, "body": body(completion)}
        if ok
        else None,
        "error": None if ok else _error(completion),
    }


def body(completion: Completion) -> dict[str, Any]:
    """The response object of the job's endpoint."""
    if completion.kind is Kind.SCORE:
        return _score(completion)
    chat = completion.kind is Kind.CHAT
    shaped = _chat_choice if chat else _text_choice
    out = _head(completion, "chatcmpl" if chat else "cmpl", "chat.completion" if chat else "text_completion")
    out["choices"] = [shaped(choice) for choice in completion.choices]
    out["usage"] = _usage(completion)
    return out | _prompt_extras(completion)


def _error(completion: Completion) -> dict[str, str]:
    code = _CODES.get(completion.status, "error")
    if completion.error is None:
        return {"code": code, "message": f"the job ended as {completion.status.value}"}
    expected = completion.status in (Status.EXPIRED, Status.CANCELLED)
    return {"code": code if expected else completion.error.code, "message": completion.error.message}


def _head(completion: Completion, prefix: str, kind: str) -> dict[str, Any]:
    created = completion.timings.finished or completion.timings.enqueued or 0
    return {
        "id": f"{prefix}-{completion.id}",
        "object": kind,
        "created": int(created),
        "model": completion.model,
    }


def _chat_choice(choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        content = [
            _named(t.token_id, t.token, t.logprob) | {"top_logprobs": [_named(*best) for best in t.top]}
            for t in choice.logprobs
        ]
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return _common(choice) | {"message": message, "logprobs": logprobs}


def _text_choice(choice: Choice) -> dict[str, Any]:
    logprobs = None if choice.logprobs is None else _text_logprobs(choice.logprobs)
    return _common(choice) | {"text": choice.text, "logprobs": logprobs}


def _common(choice: Choice) -> dict[str, Any]:
    out: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
    if choice.stop_reason is not None:
        out["stop_reason"] = choice.stop_reason
    if choice.token_ids:
        out["token_ids"] = choice.token_ids
    return out


def _text_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """The completions form: parallel lists. `top_logprobs` is null where no alternatives were asked for."""
    tokens = [_text(t.token_id, t.token) for t in logprobs]
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(t.logprob) for t in logprobs],
        "top_logprobs": [{_text(i, text): _finite(p) for i, text, p in t.top} for t in logprobs]
        if any(t.top for t in logprobs)
        else None,
        "text_offset": offsets,
    }


def _score(completion: Completion) -> dict[str, Any]:
    """Log-likelihood of the continuation; headrace's own object, as OpenAI has none."""
    choice = completion.choices[0]
    out = _head(completion, "score", "score")
    out |= {"score": _finite(choice.score or 0.0), "is_greedy": choice.is_greedy}
    if choice.token_ids:
        out["token_ids"] = choice.token_ids
    if choice.logprobs is not None:
        out["logprobs"] = _text_logprobs(choice.logprobs)
    out["usage"] = _usage(completion)
    return out | _prompt_extras(completion)


def _usage(completion: Completion) -> dict[str, Any]:
    usage = completion.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _prompt_extras(completion: Completion) -> dict[str, Any]:
    """What was asked for about the prompt, in vLLM's form: one {token id: ...} for each position."""
    out: dict[str, Any] = {}
    if completion.prompt_token_ids is not None:
        out["prompt_token_ids"] = completion.prompt_token_ids
    if completion.prompt_logprobs is not None:
        out["prompt_logprobs"] = [t and _prompt_position(t) for t in completion.prompt_logprobs]
    return out


def _prompt_position(at: TokenLogprob) -> dict[str, Any]:
    ranked = [(i, text, p, rank) for rank, (i, text, p) in enumerate(at.top, start=1)]
    ranked.append((at.token_id, at.token, at.logprob, at.rank))
    return {
        str(i): {"logprob": _finite(p), "rank": rank, "decoded_token": text} for i, text, p, rank in ranked
    }


def _named(token_id: int, text: str | None, logprob: float) -> dict[str, Any]:
    token = _text(token_id, text)
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode())}


def _text(token_id: int, text: str | None) -> str:
    """vLLM's spelling of a token for models without a tokenizer."""
    return f"token_id:{token_id}" if text is None else text


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
