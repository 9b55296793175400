"""The chat format of DeepSeek V3.2 as a chat template: its checkpoints have it as Python code only.

`thinking` (default false): whether the model thinks before it answers. What it thought before the
last message of the user is left out.
"""

from __future__ import annotations

import json

# What the model was trained to read before the descriptions of functions.
_TOOLS = """\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part \
of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
"""

_BODY = """\
{%- set thinking = thinking | default(false) -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role in ('user', 'developer') -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}

{%- macro start_answer(index) -%}
  {{- '<think>' if thinking and index >= last.user else '</think>' -}}
{%- endmacro -%}

{%- macro describe_tools() -%}
  {{- '\\n\\n' + tools_text -}}
  {%- for tool in tools -%}{{- tool.function | tojson + '\\n' -}}{%- endfor -%}
  {{- '</functions>\\n' -}}
{%- endmacro -%}

{%- macro call_tools(calls) -%}
  {{- '\\n\\n<｜DSML｜function_calls>\\n' -}}
  {%- for call in calls -%}
    {{- '<｜DSML｜invoke name="' + call.function.name + '">\\n' -}}
    {%- for name, value in call.function.arguments.items() -%}
      {{- '<｜DSML｜parameter name="' + name + '" string="' -}}
      {{- ('true">' + value) if value is string else ('false">' + value | tojson) -}}
      {{- '</｜DSML｜parameter>' -}}
      {{- '' if loop.last else '\\n' -}}
    {%- endfor -%}
    {{- '\\n</｜DSML｜invoke>\\n' -}}
  {%- endfor -%}
  {{- '</｜DSML｜function_calls>' -}}
{%- endmacro -%}

{{- bos_token -}}
{%- if tools and messages[0].role != 'system' -%}{{- describe_tools() -}}{%- endif -%}
{%- for message in messages -%}
  {%- set index = loop.index0 -%}
  {%- set answered = add_generation_prompt or not loop.last -%}
  {%- if message.role == 'system' -%}
    {{- message.content -}}
    {%- if tools and loop.first -%}{{- describe_tools() -}}{%- endif -%}
  {%- elif message.role in ('user', 'developer') -%}
    {{- '<｜User｜>' -}}
    {%- if message.role == 'developer' -%}{{- "\\n\\n# The user's message is: " -}}{%- endif -%}
    {{- message.content -}}
    {%- if answered -%}{{- '<｜Assistant｜>' + start_answer(index) -}}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- if thinking and index > last.user -%}
      {{- (message.reasoning_content or '') + '</think>' -}}
    {%- endif -%}
    {{- message.content or '' -}}
    {%- if message.tool_calls -%}{{- call_tools(message.tool_calls) -}}{%- endif -%}
    {{- eos_token -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role not in ('assistant', 'tool')
        or loop.previtem.role == 'assistant' and not loop.previtem.tool_calls -%}
      {{- raise_exception('a result of a tool without a call of it') -}}
    {%- endif -%}
    {%- if loop.previtem.role != 'tool' -%}{{- '\\n\\n<function_results>' -}}{%- endif -%}
    {{- '\\n<result>' + message.content + '</result>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}
      {{- '\\n</function_results>' -}}
      {%- if answered -%}{{- '\\n\\n' + start_answer(index) -}}{%- endif -%}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('the role ' + message.role + ' is unknown') -}}
  {%- endif -%}
{%- endfor -%}
"""

# Jinja reads the escapes of JSON.
TEMPLATE = "{%- set tools_text = " + json.dumps(_TOOLS) + " -%}\n" + _BODY
