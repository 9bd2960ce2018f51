"""Request fields as users write them -> the fields of a job: OpenAI's names, vLLM's extras, flat rows.

Pure functions on parsed JSON. A field that is known but would change the answer in a way headrace
does not do is refused by name; a field that cannot change the answer is accepted; everything else is
an unknown field. `null` means "not given" wherever the field is known. Values are checked afterwards
by `headrace.messages`. Sources: OpenAI's openapi.yaml (CreateChatCompletionRequest,
CreateCompletionRequest) of August 2026 and vLLM's protocol for the extras.
"""

from __future__ import annotations

from typing import Any

from headrace.errors import InvalidJob
from headrace.messages import Kind, SamplingParams

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
URLS = {CHAT_URL: Kind.CHAT, COMPLETION_URL: Kind.COMPLETION}

#: Fields with the meaning that SamplingParams gives them.
_SAMPLING = frozenset(SamplingParams.model_fields)
#: Fields that do not change what is generated.
_HARMLESS = frozenset(
    ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "prompt_cache_retention", "parallel_tool_calls", "request_id")
)  # fmt: skip
#: Fields that headrace knows but does not do, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "truncate_prompt_tokens": (),
}
#: Where each prompt field may stand.
_CHAT_FIELDS = frozenset(("messages", "max_completion_tokens", "top_logprobs"))
_COMPLETION_FIELDS = frozenset(("prompt",))
_FLAT_FIELDS = frozenset(
    ("kind", "messages", "prompt", "prompt_token_ids", "continuation", "continuation_token_ids",
     "max_completion_tokens", "top_logprobs")
)  # fmt: skip
#: Fields of a reply's message that clients send back as null.
_NULL_IN_MESSAGE = frozenset(("refusal", "audio", "function_call", "tool_calls", "annotations", "name"))


def from_body(url: str, body: Any) -> dict[str, Any]:
    """The `body` of a batch line for `url` -> `kind`, one prompt field and `params`.

    Raises InvalidJob (`unsupported_endpoint`, `unknown_field`, `unsupported_field`, `invalid_job`).
    """
    if url not in URLS:
        raise InvalidJob(
            f"url {_shown(url)} is not served: use {CHAT_URL} or {COMPLETION_URL}", "unsupported_endpoint"
        )
    if not isinstance(body, dict):
        raise InvalidJob(f"body is a JSON {_json_type(body)}, not an object")
    kind = URLS[url]
    given = _known(body, _CHAT_FIELDS if kind is Kind.CHAT else _COMPLETION_FIELDS)
    if kind is Kind.COMPLETION:
        if isinstance(given.get("logprobs"), bool):
            raise InvalidJob("logprobs is a number of alternatives for completions, not true or false")
        if "prompt" in given:
            given |= _prompt(given.pop("prompt"))
    return _job_fields(kind, given)


def from_flat(row: dict[str, Any]) -> dict[str, Any]:
    """A bare row (one prompt field, sampling fields beside it), like `from_body`."""
    given = _known(row, _FLAT_FIELDS)
    kind = given.pop("kind", None)
    if kind is None:
        scored = "continuation" in given or "continuation_token_ids" in given
        kind = Kind.CHAT if "messages" in given else Kind.SCORE if scored else Kind.COMPLETION
    elif kind not in list(Kind):
        raise InvalidJob(f"kind {_shown(kind)} is not one of {', '.join(Kind)}")
    return _job_fields(Kind(kind), given)


def _known(row: dict[str, Any], own: frozenset[str]) -> dict[str, Any]:
    """The fields that say something, every name and every unsupported value checked."""
    given: dict[str, Any] = {}
    for name, value in row.items():
        if name in own or name in _SAMPLING:
            if value is not None:
                given[name] = value
        elif name in _UNSUPPORTED:
            if value is not None and not any(_same(value, neutral) for neutral in _UNSUPPORTED[name]):
                raise InvalidJob(
                    f"{name} {_shown(value)} is not supported: remove the field", "unsupported_field"
                )
        elif name not in _HARMLESS:
            raise InvalidJob(f"unknown field {_shown(name)}", "unknown_field")
    if row.get("model") is not None and not isinstance(row["model"], str):
        raise InvalidJob(f"model is a JSON {_json_type(row['model'])}, not a string")
    return given


def _job_fields(kind: Kind, given: dict[str, Any]) -> dict[str, Any]:
    if "max_completion_tokens" in given:
        value = given.pop("max_completion_tokens")
        if given.setdefault("max_tokens", value) != value:
            raise InvalidJob("max_tokens and max_completion_tokens differ: give one of them")
    _chat_logprobs(given)
    if any(given.get(name) in ("", []) for name in ("prompt", "prompt_token_ids", "messages")):
        raise InvalidJob("the prompt is empty", "empty_prompt")
    if isinstance(given.get("messages"), list):
        given["messages"] = [_message(m) for m in given["messages"]]
    params = {name: given.pop(name) for name in list(given) if name in _SAMPLING}
    return {"kind": kind.value, **given, "params": params}


def _chat_logprobs(given: dict[str, Any]) -> None:
    """OpenAI's chat form (a switch and `top_logprobs`) -> one number; a plain number stays as it is."""
    top = given.pop("top_logprobs", None)
    asked = given.get("logprobs")
    if isinstance(asked, bool):
        del given["logprobs"]
        if asked:
            given["logprobs"] = 0 if top is None else top
    if top is not None and asked is not True:
        raise InvalidJob("top_logprobs needs logprobs: true beside it")


def _prompt(prompt: Any) -> dict[str, Any]:
    """OpenAI's `prompt`: text or token ids; a list around one of them is peeled."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if any(isinstance(p, (str, list)) for p in prompt):
            raise InvalidJob(
                f"prompt holds {len(prompt)} prompts: a row has one, write one line for each",
                "unsupported_field",
            )
        return {"prompt_token_ids": prompt}
    return {"prompt": prompt}


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {k: v for k, v in message.items() if v is not None or k not in _NULL_IN_MESSAGE}


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
