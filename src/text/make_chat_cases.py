#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/tokenizer/chat_cases.json: templates and conversations with the text that transformers makes.

  python3 -m venv /tmp/refvenv && /tmp/refvenv/bin/pip install transformers jinja2
  /tmp/refvenv/bin/python src/text/make_chat_cases.py
"""
import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parents[2]
KIMI = """{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and messages[0]['role'] != 'system' -%}
  <|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>
  {%- endif -%}
  {%- set role = message.get('name') or message['role'] -%}
  {%- if message['role'] == 'assistant' -%}<|im_assistant|>{{ role }}<|im_middle|>
  {%- elif message['role'] == 'user' -%}<|im_user|>{{ role }}<|im_middle|>
  {%- else -%}<|im_system|>{{ role }}<|im_middle|>{%- endif -%}
  {%- if message.get('tool_calls') -%}
    {{- message['content'] }}<|tool_calls_section_begin|>
    {%- for call in message['tool_calls'] -%}
      {%- set args = call['function']['arguments'] -%}
      <|tool_call_begin|>functions.{{ call['function']['name'] }}:{{ loop.index0 }}<|tool_call_argument_begin|>
      {{- args if args is string else args | tojson }}<|tool_call_end|>
    {%- endfor -%}<|tool_calls_section_end|>
  {%- elif message['content'] is string -%}{{ message['content'] }}
  {%- else -%}{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
TEMPLATES = {
    "kimi": KIMI,
    "namespace": """{% set ns = namespace(n=0, last='') %}
{% for m in messages %}
    {% set ns.n = ns.n + m.content|length %}
    {% set ns.last = m.role|upper %}
  {{ loop.index }}/{{ loop.length }} {{ m.content | trim | replace('\\n', ' ') }}
{% endfor %}
{{ ns.n }} {{ ns.last }} {{ bos_token }}{{ eos_token is defined }} {{ missing is defined }}
""",
    "controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}
{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}{% generation %} [{{ messages[-1].content }}] {% endgeneration %}
""",
    "json": "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}{{ tools | tojson }}{{ thinking | tojson }}"
            "{{ {'b': [1, 2.5, none, true], 'a': '<é&\\'\"'} | tojson(sort_keys=true) }}",
    "macro": """{% macro turn(m, tag='im') -%}
<|{{ tag }}_{{ m.role }}|>{{ m['content'] }}
{%- endmacro %}
{{ messages | map(attribute='role') | join(',') }}{% for m in messages[::-1] %}{{ turn(m) }}{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 'a-b'.split('-')[1] }} {{ -7 // 2 }}""",
    "raise": """{% for m in messages %}
{% if m.role not in ['user', 'assistant'] %}
{{ raise_exception('Unknown role: ' + m.role) }}
{% endif %}
{{ m.content }}
{% endfor %}""",
    "immutable": "{{ messages.append(1) }}",
    "syntax": "a\n{% for %}",
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Wetter für <b>Städte</b>",
                                           "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                                                          "required": ["city"]}}}]
CHATS = [
    [{"role": "user", "content": "Hello 世界 \"quoted\" <b>\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  a\n\n"},
     {"role": "assistant", "content": "b"}, {"role": "user", "content": "🙂\ttab \\ backslash"}],
    [{"role": "user", "content": "Weather?"},
     {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2, "x": 0.5}}}]},
     {"role": "tool", "name": "get_weather", "content": "## Return\nsunny"}],
    [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
]


def main():
    reference = (ROOT / "models/kilin-docs-10m/chat_template.jinja").read_text()
    cases = []
    for name, template in {"kilin-docs-10m": reference, **TEMPLATES}.items():
        for i, chat in enumerate(CHATS):
            case = {"name": f"{name}/{i}", "template": template, "messages": chat, "tools": TOOLS if i == 2 else None,
                    "add_generation_prompt": i != 1, "extra": {"bos_token": "[BOS]", "thinking": i == 0}}
            try:
                case["text"] = render_jinja_template([chat], case["tools"], chat_template=template,
                                                     add_generation_prompt=i != 1, **case["extra"])[0][0]
            except Exception as error:  # noqa: BLE001: any failure is the case's result
                case["error"] = str(error)
            cases.append(case)
    out = ROOT / "tests/data/tokenizer/chat_cases.json"
    out.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(cases)} cases, {sum('error' in c for c in cases)} of them errors")


if __name__ == "__main__":
    main()
