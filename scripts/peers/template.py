"""The model's chat template: turns as in Qwen's, with its system turn where there is none.

The peers' own templates for this architecture write the same text, so that every tool trains on the
same tokens.
"""

from __future__ import annotations

SYSTEM = "You are a helpful assistant."

CHAT_TEMPLATE = """\
{%- for turn in messages -%}
{%- if loop.first and turn.role != 'system' -%}
{{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + turn.role + '\\n' -}}
CONTENT
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)

_CONTENT = """\
{%- if turn.content is string -%}
{{- turn.content -}}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}"""

MARKED_TEMPLATE = CHAT_TEMPLATE.replace(
    "CONTENT",
    f"{{%- if turn.role == 'assistant' -%}}{{%- generation -%}}\n{_CONTENT}\n"
    f"{{%- endgeneration -%}}{{%- else -%}}\n{_CONTENT}\n{{%- endif -%}}",
)
"""The same text, with the marks by which TRL knows the answers."""

CHAT_TEMPLATE = CHAT_TEMPLATE.replace("CONTENT", _CONTENT)
