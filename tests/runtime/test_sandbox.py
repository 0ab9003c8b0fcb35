"""Chat templates are other people's programs: bounded in time, memory and reach, and those of real models unharmed."""

import resource
import sys
import time

import pytest

from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.messages import user_message
from resprune.runtime.prompt.template import render
from tests.runtime.bundles import one_sentence

VARIABLES = {"bos_token": "<s>", "image_token": "<image>"}
DOUBLED = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = EXPRESSION %}{% endfor %}"
LONG = "{% set s = 'ab' * 400000 %}{% set r = range(99999) | list %}"
GREEDY = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a list twice": LONG + "{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 10**9 }}",
    "product from the left": "{{ 10**9 * 'a' }}",
    "list product": "{{ [1] * 10**9 }}",
    "power": "{{ 99999 ** 99999 ** 9 }}",
    "squares": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "filter": "{{ 'a' | center(10**9) }}",
    "filter block": "{% filter center(10**9) %}x{% endfilter %}",
    "method": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent filter": "{{ '%999999999d' | format(1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "format map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "indent": "{{ messages | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice filter": "{{ [1] | slice(10**9) | list }}",
    "join": "{{ range(99999) | map('string') | join('a' * 99999) }}",
    "join method": "{{ ('a' * 99999).join(['x'] * 99999) }}",
    "replace": LONG + "{{ s | replace('a', s) }}",
    "replace method": LONG + "{{ s.replace('a', s) }}",
    "wrap": LONG + "{{ s | wordwrap(1, wrapstring=s) }}",
    "tilde": DOUBLED.replace("EXPRESSION", "ns.s ~ ns.s"),
    "plus": DOUBLED.replace("EXPRESSION", "ns.s + ns.s"),
    "lists": DOUBLED.replace("EXPRESSION", "[ns.s, ns.s]") + "{{ ns.s }}",
    "lists as JSON": DOUBLED.replace("EXPRESSION", "[ns.s, ns.s]") + "{{ ns.s | tojson }}",
    "growing": DOUBLED.replace("EXPRESSION", "ns.s | replace('a', 'aa')"),
    "blocks": "{% set ns = namespace(s='ab') %}"
    + "{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop without end": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "output": "{% for i in range(99999) %}" + "a" * 500 + "{% endfor %}",
    "search": LONG + "{% for i in r %}{{ -1 in r }}{% endfor %}",
    "test": LONG + "{% for i in r %}{{ -1 is in r }}{% endfor %}",
    "slices": LONG + "{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "range": "{{ range(10**9) }}",
}


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_a_template_that_takes_too_much_is_refused(template: str) -> None:
    before, start = peak_memory(), time.process_time()
    with pytest.raises(ResPruneError) as error:
        render([user_message("why?", 1)], "<image>" + template, VARIABLES)
    spent = time.process_time() - start
    assert "chat template cannot make this prompt" in one_sentence(error.value)
    assert "for an image" not in str(error.value), "it would have been rendered"
    assert spent < 20
    assert peak_memory() - before < 200e6


@pytest.mark.parametrize(
    "template",
    [
        "{% break %}",
        "{% continue %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{% for i in messages %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "-" * 20_000 + "1 }}",
        "{{ 1" + "+1" * 20_000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{% for %}",
        "{{ 'a' | nothing }}",
    ],
    ids=lambda text: text[:24],
)
def test_a_template_that_does_not_compile_is_refused(template: str) -> None:
    with pytest.raises(ResPruneError, match="not valid Jinja") as error:
        render([user_message("why?", 1)], template, VARIABLES)
    one_sentence(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{% include 'secret' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_reaches_nothing_of_python(template: str) -> None:
    with pytest.raises(ResPruneError, match="cannot make this prompt"):
        render([user_message("why?", 1)], "<image>" + template, VARIABLES)


def test_long_questions_and_conversations_are_within_the_budget() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part.type == 'image' %}<image>"
        "{% elif 'text' in part %}{{ (part.text | trim).replace('\r', '') + ' ' }}{% endif %}{% endfor %}"
        "{% if loop.last and message is mapping %}!{% endif %}{% endfor %}"
    )
    long = "word " * 50_000
    assert render([user_message(long, 1)], template, VARIABLES) == f"<image>{long.strip()} !"
    turns = [user_message("and now? " * 20, 0) for _ in range(500)]
    assert render([user_message("why?", 1), *turns], template, VARIABLES).endswith("and now? !")


def test_what_is_allowed_gives_what_jinja_gives() -> None:
    template = (
        "<image>{{ 'a' * 3 ~ 1 }}{{ '%5.1f|%s' % (2.5, 'x') }}{{ '{:>4}'.format(7) }}{{ [3, 1] | sort | join(',') }}"
        "{{ messages | length }}{{ nothing is defined }}{{ nothing }}{% for i in nothing %}{% endfor %}"
        "{{ 2 ** 10 }}{{ 'b' in 'abc' }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ range(3) | list }}"
        "{{ [[1], [2]] | sum(start=[]) }}"
        "{% set x %}{{ 'k' }}{% endset %}{{ x }}{% for a in 'xy' %}{{ loop.index }}{{ loop.last }}{{ a }}{% endfor %}"
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ 'a-b'.split('-') }}{{ none }}{{ true }}{{ 1.5 | round | int }}"
    )
    expected = (
        "<image>aaa1  2.5|x   71,31False1024Truebccba[0, 1, 2][1, 2]k1Falsex2Truey"
        "[('a', 2), ('b', 1)]['a', 'b']NoneTrue2"
    )
    assert render([user_message("why?", 1)], template, VARIABLES) == expected
