# ruff: noqa: E501 (templates are quoted as they are published)
"""Chat templates in the style of published models, and conversations to render with them."""

from __future__ import annotations

from tests.engine.text.builders import CHATML, MISTRAL

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system<|endoftext|>\\n\\n" }}
{{- "Today's year: " + strftime_now("%Y") + "\\n\\n" }}
{{- system_message }}
{{- "<|im_end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '<|endoftext|>\\n\\n'+ message['content'] | trim + '<|im_end|>' }}
    {%- else %}
        {{- raise_exception("only plain turns") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|endoftext|>\\n\\n' }}
{%- endif %}
"""

TRAINING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.role | upper }}: {{ m.content }}{% endif %}{% if loop.index > 90 %}{% break %}{% endif %}"
    "{{ '\n' if not loop.last }}{% endfor %}{{ loop is defined }}{{ messages | map(attribute='role') | join(',') }}"
)

#: Blocks on lines of their own: their newlines and indents must not show.
LINES = """{% if messages[0].role == 'system' %}
<|im_start|>{{ messages[0].content }}
{% endif %}
{% for m in messages %}
    {% if m.role != 'system' %}
{{ m.role }}: {{ m.content }}<|im_end|>
    {% endif %}
{% endfor %}
assistant:
"""

BYTE_LEVEL_STYLES = {"chatml": CHATML, "qwen3": QWEN3, "llama3": LLAMA3, "training": TRAINING, "lines": LINES}
SENTENCEPIECE_STYLES = {"mistral": MISTRAL}

CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "What is 12 + 30?"}],
    "with a system prompt": [
        {"role": "system", "content": " You are terse.\n"},
        {"role": "user", "content": "naïve café, 你好 😀\n\n    code"},
    ],
    "many turns": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nhi there!"},
        {"role": "user", "content": "  spaces around  "},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": 'the {{ braces }} & <b>html</b> "quotes" \' \\n'},
    ],
}
