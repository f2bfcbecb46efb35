"""Chat templates: which one is meant, what they may use, and that none of them can hang, fill memory or reach out."""

from __future__ import annotations

import time
from typing import Any

import pytest
from mq_quant.formats.errors import TokenError
from mq_quant.formats.tokenizer import chat, chat_template, render_chat

EACH = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "grüß <gott>"}]


def rendered(template: Any, **config: Any) -> str:
    return render_chat({"chat_template": template, **config}, MESSAGES, "model.mq4")


def test_the_message_stands_where_the_template_puts_it() -> None:
    assert (
        rendered(EACH + "{% if add_generation_prompt %}[assistant]{% endif %}")
        == "[user]grüß <gott>[assistant]"
    )


@pytest.mark.parametrize(
    "template",
    [
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": EACH}],
        [{"name": "rag", "template": EACH}],
        {"default": EACH, "tool_use": "no"},
        [{"name": "default", "template": EACH}, {"name": 5, "template": "no"}, "no", None],
    ],
)
def test_of_several_templates_the_default_is_taken(template: Any) -> None:
    assert rendered(template) == "[user]grüß <gott>"


@pytest.mark.parametrize("template", [None, 5, [], {}, [5], [{"name": "default"}], {"default": None}])
def test_without_a_template_that_is_said(template: Any) -> None:
    assert chat_template({"chat_template": template}, "model.mq4") is None
    with pytest.raises(TokenError, match=r"model\.mq4: has no chat template"):
        rendered(template)


def test_several_templates_of_which_none_is_the_default_are_named() -> None:
    with pytest.raises(TokenError, match=r"called 'rag', 'tool_use', none 'default'"):
        rendered({"rag": EACH, "tool_use": EACH})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% break %}{% endfor %}end", "end"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{%- generation -%} x {%- endgeneration -%} y", "xy"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        ("{{ 'ü<&' | tojson }}", '"ü<&"'),
        ("{{ 'ü' | tojson(ensure_ascii=True) }}", '"\\u00fc"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(sort_keys=True, separators=(',', ':')) }}", '{"a":[2],"b":1}'),
        ("{{ {'a': [2]} | tojson(indent=1) }}", '{\n "a": [\n  2\n ]\n}'),
        ("  {% if true %}\n  yes\n  {% endif %}\nend", "  yes\nend"),
        ("{{ tools is none }}{{ documents is none }}{{ thinking is defined }}", "TrueTrueFalse"),
        ("{{ messages[0]['content'].split('<')[0] | trim | upper }}", "GRÜSS"),
        ("{{ unknown_variable }}", ""),
    ],
)
def test_what_templates_may_use(template: str, text: str) -> None:
    assert rendered(template) == text


def test_the_date_is_that_of_today() -> None:
    assert rendered("{{ strftime_now('%Y') }}") in {time.strftime("%Y"), str(int(time.strftime("%Y")) - 1)}


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False, "__type": "AddedToken"}])
def test_special_tokens_are_texts_or_objects(token: Any) -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ additional_special_tokens | join }}"
    more = {"additional_special_tokens": [token, "<x>", 7], "pad_token": 5}
    assert rendered(template, bos_token=token, eos_token=None, **more) == "<s><s><x>"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("one\n{% for m in messages %}", "line 2: .*end of template"),
        ("\n\n{{ 1 + }}", "line 3: "),
        ("\n{{ raise_exception('roles must alternate') }}", "line 2: roles must alternate"),
        ("\n{{ nothing.at.all }}", "line 2: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "line 1: division by zero"),
        ("\n\n{{ 'a' + 1 }}", "line 3: "),
        ("{{ messages.__class__.__mro__ }}", "line 1: .*unsafe"),
        ("{{ messages.append(1) }}", "line 1: .*unsafe"),
        ("{% include '/etc/passwd' %}", "line 1: "),
        ("{% unknown %}", "line 1: .*unknown tag"),
        ("{{ 'x' * 10**10 }}", "it needs more than 1024 MiB"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it nests too deeply"),
        ("{{ " + "(" * 999 + "1" + ")" * 999 + " }}", "it nests too deeply"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}spam{% endfor %}{% endfor %}",
            "it makes a prompt of more than",
        ),
        ("{{ range(10**9) | list }}", "line 1: .*[Rr]ange"),
    ],
)
def test_templates_that_cannot_be_used_are_one_error_with_the_line(template: str, problem: str) -> None:
    with pytest.raises(TokenError, match=rf"model\.mq4: its chat template cannot be used: {problem}"):
        rendered(template)


def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 3)
    with pytest.raises(TokenError, match="it runs for more than 3 seconds"):
        rendered("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")


def test_where_no_program_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(TokenError, match="/nowhere/python cannot be started"):
        rendered(EACH)
