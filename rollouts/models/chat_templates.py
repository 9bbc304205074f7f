"""The chat template given to tokenizers that are trained here: ChatML with tools, one message at a time.

    <|im_start|>system\\n{text}[\\n\\n# Tools ...]<|im_end|>\\n
    <|im_start|>user\\n{text}<|im_end|>\\n
    <|im_start|>assistant\\n[<think>\\n{reasoning}\\n</think>\\n\\n]{text}[\\n<tool_call>\\n{json}\\n</tool_call>]*<|im_end|>\\n
    <|im_start|>tool\\n<tool_response>\\n{text}\\n</tool_response><|im_end|>\\n

The forms of tool lists, tool calls and tool responses are those of Hermes and Qwen, which the ``hermes`` tool parsers
of vLLM and SGLang read. Two properties are worth more here than copying any one family's template:

- Each message is rendered alone, whatever follows it: ``render(a + b) == render(a) + render(b)`` once the opening
  system block is out. So the rendering of the first k messages, with a generation prompt where the assistant speaks
  next, is a prefix of the whole rendering, and a rollout only ever appends. (Qwen3 drops the reasoning of earlier turns
  and puts consecutive tool responses into one turn, so there a history changes when it grows.)
- What the assistant has to produce, its text and ``<|im_end|>`` but not the header or the newline after, lies inside
  ``{% generation %}``, where ``apply_chat_template(..., return_assistant_tokens_mask=True)`` takes the loss mask from.
  Nothing is inserted that a message does not hold: no default system message, no empty think block, no stripping.

The prefix holds for tokens too, except where an assistant's text begins with a newline, which joins the header's in one
token when a finished conversation is tokenized; a rollout keeps the tokens that were sampled and is not concerned.

Content may be a string, nothing, or a list of ``{"type": "text", "text": ...}`` parts. Tool-call arguments may be a
mapping or a JSON string, with or without OpenAI's ``{"type": "function", "function": ...}`` around the call.
"""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)  # never shown to a person: dropped by skip_special_tokens=True
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # kept

CHAT_TEMPLATE = r"""
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('this model reads text only; a message holds a part of type ' ~ part.type) -}}
            {%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- set has_system = messages[0].role == 'system' -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if has_system -%}
        {{- text(messages[0].content) ~ '\n\n' -}}
    {%- endif -%}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' ~ (tool | tojson) -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\n' -}}
    {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- elif has_system -%}
    {{- '<|im_start|>system\n' ~ text(messages[0].content) ~ '<|im_end|>\n' -}}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- if not loop.first -%}
            {{- '<|im_start|>system\n' ~ text(message.content) ~ '<|im_end|>\n' -}}
        {%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ text(message.content) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>tool\n<tool_response>\n' ~ text(message.content) ~ '\n</tool_response><|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}
            {%- set content = text(message.content) -%}
            {%- if message.reasoning_content -%}
                {{- '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' -}}
            {%- endif -%}
            {{- content -}}
            {%- for call in message.tool_calls or [] -%}
                {%- set function = call.function or call -%}
                {%- set arguments = function.arguments -%}
                {%- if content or not loop.first -%}
                    {{- '\n' -}}
                {%- endif -%}
                {{- '<tool_call>\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' -}}
                {{- (arguments if arguments is string else (arguments or {}) | tojson) ~ '}\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message.role ~ '; use system, user, assistant or tool') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()
