"""The playground: what it is told, who may see it, and its page in a real browser."""

import json
import threading
import time

import pytest
import requests
from omegaconf import DictConfig

from proxytune import api
from proxytune.cli.playground import _suggestions, check_playground
from proxytune.errors import UserError
from proxytune.server import ServerSettings, create_app
from proxytune.server.playground import Playground, Suggestion
from proxytune.server.turns import Turns, share_models
from tests.browsing import click, picture, resize, wait
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = {system: f"tiny-{system}" for system in ("base", "expert", "proxy", "tuned")}
SUGGESTED = [
    Suggestion("gsm8k 1: Kim", "chat", "Kim has 8 boxes", "Answer:", max_tokens=9),
    Suggestion("humaneval 1: def", "text", "def f(x):", max_tokens=7, stop=["\nclass"]),
]


def app(**settings):
    base, tuned = tiny_model(seed=0), tiny_model(seed=3)
    expert, antiexpert = tiny_model(seed=1, hidden=16), tiny_model(seed=2, hidden=16)
    tokenizer = tiny_tokenizer()
    systems = {
        "proxy": api.load(base, expert, antiexpert, tokenizer=tokenizer),
        "base": api.load(base, tokenizer=tokenizer),
        "expert": api.load(expert, tokenizer=tokenizer),
        "tuned": api.load(tuned, tokenizer=tokenizer),
    }
    return create_app(
        {NAMES[each]: generator for each, generator in systems.items()},
        ServerSettings(**settings),
        playground=Playground("tiny models.", NAMES, SUGGESTED),
    )


@pytest.fixture(scope="module")
def home():
    from tests.serving import running

    with running(app()) as url:
        yield url.removesuffix("/v1")


# -- what is served --------------------


def test_the_page_takes_nothing_from_elsewhere(home):
    answer = requests.get(home + "/", timeout=20)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert 'src="' not in answer.text.replace('src="data:', "")
    assert "https://" not in answer.text and "http://" not in answer.text
    assert "Kim has" not in answer.text  # the page holds no text of the server's


def test_the_page_is_told_systems_examples_and_what_can_be_asked(home):
    told = requests.get(home + "/v1/playground", timeout=20).json()
    assert [each["system"] for each in told["systems"]] == ["base", "expert", "proxy", "tuned"]
    assert told["members"] and told["alphas"] == {"alpha": 1.0} and told["formula"] == "proxy"
    formulas = {each["name"]: each["settings"] for each in told["formulas"]}
    assert formulas.keys() == {"dexperts", "gated", "contrastive"}
    assert formulas["gated"] == {"threshold": 0.4}
    assert told["examples"][0]["prefix"] == "Answer:" and told["examples"][1]["form"] == "text"
    named = [each["id"] for each in requests.get(home + "/v1/models", timeout=20).json()["data"]]
    assert named[0] == "tiny-proxy" and set(named) == set(NAMES.values())


def test_a_key_guards_all_that_the_page_shows():
    from tests.serving import running

    with running(app(api_key="secret")) as url:
        home = url.removesuffix("/v1")
        assert requests.get(home + "/", timeout=20).status_code == 200
        assert requests.get(home + "/v1/playground", timeout=20).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert requests.get(home + "/v1/playground", headers=key, timeout=20).status_code == 200


def test_without_it_there_is_no_page():
    from tests.serving import running

    with running(create_app(api.load(tiny_model(), tokenizer=tiny_tokenizer()))) as url:
        assert requests.get(url.removesuffix("/v1") + "/", timeout=20).status_code == 404
        assert requests.get(url + "/playground", timeout=20).status_code == 404


@pytest.mark.slow
def test_systems_that_share_models_answer_at_once_what_each_answers_alone(home):
    """Rows of different lengths are read packed, which sets the model's attention meanwhile."""
    prompts = [f"{word} sold clips to {'and ' * number}" for number, word in enumerate("abcdef")]
    asked = [(system, prompt) for prompt in prompts for system in NAMES]

    def ask(system, prompt):
        body = {"model": NAMES[system], "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = requests.post(home + "/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    alone = {each: ask(*each) for each in asked}
    together = {}
    threads = [
        threading.Thread(target=lambda each=each: together.__setitem__(each, ask(*each)))
        for each in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_only_systems_that_share_a_model_take_turns():
    one, two = tiny_model(seed=0), tiny_model(seed=1)
    first, again = api.load(one, one, two), api.load(two)
    assert share_models([first, again])
    assert not share_models([first, api.load(tiny_model(seed=0))])


def test_turns_go_to_who_has_waited_longest():
    turns, order = Turns(), []

    def work(name):
        for _ in range(3):
            with turns:
                order.append(name)
                time.sleep(0.05)  # the others ask meanwhile

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert "".join(order) == "abcabcabc"


# -- the command --------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"system": "base"}, "system=base"),
        ({"chat_only": True}, "chat_only=true"),
        ({"engine": {"name": "vllm"}}, "engine=vllm"),
    ],
)
def test_settings_without_which_it_cannot_work(settings, words):
    usual = {"system": "proxy", "chat_only": False, "engine": {"name": "own"}}
    with pytest.raises(UserError, match=words):
        check_playground(DictConfig(usual | settings))
    check_playground(DictConfig(usual))


def test_prompts_come_from_the_tasks_of_the_triples_experiment():
    from proxytune.files import ROOT

    found = list(_suggestions("pocket", str(ROOT)))
    tasks = {each.label.split()[0] for each in found}
    assert {"pocket_gsm8k", "pocket_triviaqa", "pocket_humaneval"} <= tasks
    forms = {each.label.split()[0]: each.form for each in found}
    assert forms["pocket_humaneval"] == "text" and forms["pocket_gsm8k"] == "chat"
    assert all(each.prompt and each.max_tokens <= 256 for each in found)
    assert list(_suggestions("llama2_13b_chat", str(ROOT))) == []  # its data are on a hub
    assert list(_suggestions(None, str(ROOT))) == []


# -- in a browser --------------------


def open_page(browser, home, link="", width=1280, answered=None):
    resize(browser, width, 900)
    browser.get("about:blank")
    browser.get(home + "/" + link)
    wait(browser, "return document.documentElement.dataset.ready === 'yes'")
    if answered:
        answers(browser, answered)


def answers(browser, number):
    wait(browser, f"return document.documentElement.dataset.answered === '{number}'", 60)


def text(browser, system):
    query = f"return document.querySelector('[data-system={system}] .body').textContent"
    return browser.execute_script(query)


def set_value(browser, name, value):
    browser.execute_script(
        f"const e = document.getElementById('{name}'); e.value = {json.dumps(value)};"
        "e.dispatchEvent(new Event('input', {bubbles: true}))"
    )


@pytest.mark.thinned(1)
def test_a_prompt_is_answered_by_four_systems_and_alpha_moves_the_proxy(browser, home):
    open_page(browser, home)
    assert browser.execute_script("return document.getElementById('prompt').value") == (
        "Kim has 8 boxes"  # the first example
    )
    set_value(browser, "prompt", "Natalia sold clips to")
    set_value(browser, "prefix", "")
    click(browser, "#run")
    answers(browser, 1)
    first = {system: text(browser, system) for system in NAMES}
    assert all(first.values()) and len(set(first.values())) >= 3
    speeds = browser.execute_script(
        "return [...document.querySelectorAll('.speed')].map(s => s.textContent)"
    )
    assert all(speed.endswith("tokens/s") for speed in speeds)
    set_value(browser, "alpha", "0")
    answers(browser, 2)
    assert text(browser, "proxy") == first["base"]  # without a shift it is the base
    assert text(browser, "tuned") == first["tuned"]
    picture(browser, "playground.png")
    set_value(browser, "prompt", "Kim has 8 boxes")
    set_value(browser, "alpha", "1")  # the others' answers belong to another prompt
    answers(browser, 3)
    assert text(browser, "base") != first["base"]
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_a_formula_and_its_settings_are_chosen_kept_in_the_link_and_copied(browser, home):
    shown = "return document.getElementById('formula-shown').textContent"
    open_page(browser, home)
    assert "alpha × (expert − antiexpert)" in browser.execute_script(shown)
    click(browser, "#run")
    answers(browser, 1)
    plain = text(browser, "proxy")
    set_value(browser, "formula", "gated")
    answers(browser, 2)
    set_value(browser, "threshold", "0")
    answers(browser, 3)  # no largest probability is below 0: the base alone
    assert text(browser, "proxy").removesuffix("end") == text(browser, "base") != plain
    assert "threshold" in browser.execute_script(shown)
    picture(browser, "playground_formula.png")
    click(browser, "#link")
    link = "#" + browser.current_url.partition("#")[2]
    click(browser, "#python")
    copied = "return document.documentElement.dataset.copied"
    wait(browser, copied + ".startsWith('import')")
    asked = json.loads(
        json.loads(browser.execute_script(copied).split("loads(")[1].split(")\n")[0])
    )
    assert asked["formula"] == {"name": "gated", "threshold": 0} and asked["alpha"] == 1
    open_page(browser, home, link, answered=1)
    assert text(browser, "proxy").removesuffix("end") == text(browser, "base")
    open_page(browser, home, link.replace("formula=gated", "formula=mine"))
    status = "return document.getElementById('status').textContent"
    assert "The link's formula mine is not on this server" in browser.execute_script(status)
    assert text(browser, "proxy") == ""
    # a link that was cut, and an alpha beyond the slider's usual end
    open_page(browser, home, "#prompt=Kim&alpha=5&choices=%5B%5B1", answered=1)
    shown = "return document.getElementById('alpha-shown').textContent"
    assert browser.execute_script(shown) == "5.00" and text(browser, "proxy") != ""


@pytest.mark.slow
def test_several_pairs_have_an_alpha_each(browser):
    from tests.serving import running

    base, antiexpert, tokenizer = (
        tiny_model(seed=0),
        tiny_model(seed=2, hidden=16),
        tiny_tokenizer(),
    )
    given = {each: (tiny_model(seed=n, hidden=16), antiexpert) for n, each in ((1, "a"), (4, "b"))}
    alphas = {"a": 0.5, "b": 1.0}
    systems = {
        "tiny-proxy": api.load(base, pairs=given, alpha=alphas, tokenizer=tokenizer),
        "tiny-base": api.load(base, tokenizer=tokenizer),
    }
    told = Playground("pairs.", {"base": "tiny-base", "proxy": "tiny-proxy"}, SUGGESTED)
    with running(create_app(systems, playground=told)) as url:
        open_page(browser, url.removesuffix("/v1"))
        click(browser, "#run")
        answers(browser, 1)
        first = text(browser, "proxy")
        set_value(browser, "alpha-a", "0")
        answers(browser, 2)
        set_value(browser, "alpha-b", "0")
        answers(browser, 3)
        assert text(browser, "proxy").removesuffix("end") == text(browser, "base")
        assert text(browser, "proxy") != first
        hidden = "return document.getElementById('formula-label').hidden"
        assert browser.execute_script(hidden)  # pairs have one formula


@pytest.mark.slow
def test_a_token_shows_its_candidates_and_what_would_have_followed(browser, home):
    from selenium.webdriver.common.action_chains import ActionChains

    open_page(browser, home)
    click(browser, "#run")
    answers(browser, 1)
    before = text(browser, "proxy")
    token = browser.find_elements("css selector", ".tokens span")[2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(browser).move_to_element(token).perform()
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    for word in ("proxy", "base", "expert", "antiexpert", "%"):
        assert word in tip.text
    token.click()  # pins it
    picture(browser, "playground_tip.png")
    click(browser, "#tip tr:first-child td:nth-child(3) button")  # the proxy's second choice
    answers(browser, 2)
    after = text(browser, "proxy")
    assert after != before
    spans = (
        "return [...document.querySelectorAll('.tokens span')].slice(0, 2).map(s => s.textContent)"
    )
    assert before.startswith("".join(browser.execute_script(spans)))
    assert browser.execute_script("return document.querySelectorAll('.given').length") == 1
    link = "#" + browser.current_url.partition("#")[2]
    open_page(browser, home, link, answered=2)
    assert text(browser, "proxy") == after
    back = browser.find_element("css selector", "[data-system=proxy] .under button")
    browser.execute_script("arguments[0].click()", back)
    answers(browser, 3)
    assert text(browser, "proxy") == before


def test_the_keyboard_reaches_everything(browser, home):
    open_page(browser, home)
    click(browser, "#run")
    answers(browser, 1)
    before = text(browser, "proxy")
    seen = []
    for _ in range(25):
        browser.switch_to.active_element.send_keys("\ue004")  # Tab
        now = browser.switch_to.active_element
        seen.append(now.get_attribute("id") or now.get_attribute("class"))
        if "tokens" in (now.get_attribute("class") or ""):
            break
    for name in (
        "example",
        "form",
        "prompt",
        "prefix",
        "formula",
        "alpha",
        "temperature",
        "tokens",
        "seed",
    ):
        assert name in seen
    for name in ("run", "link", "curl", "python"):
        assert name in seen
    body = browser.switch_to.active_element
    body.send_keys("\ue014\ue014\ue007")  # two to the right, Enter
    focused = browser.switch_to.active_element
    assert focused.tag_name == "button"
    focused.send_keys("\ue004\ue007")  # the next candidate, Enter
    answers(browser, 2)
    assert text(browser, "proxy") != before


@pytest.mark.slow
def test_what_is_copied_answers_the_same(browser, home):
    import shlex
    import subprocess
    import sys

    open_page(browser, home)
    click(browser, "#run")
    answers(browser, 1)
    shown = text(browser, "proxy").removesuffix("end")
    copied = "return document.documentElement.dataset.copied"
    click(browser, "#python")
    wait(browser, copied)
    script = browser.execute_script(copied).replace("print(answer.json())", PRINTS)
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) == shown
    click(browser, "#curl")
    wait(browser, copied + ".startsWith('curl')")
    words = shlex.split(browser.execute_script(copied))
    body = json.loads(words[-1])
    answer = requests.post(words[1], json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == shown


PRINTS = 'print(json.dumps(answer.json()["choices"][0]["message"]["content"]))'


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_can_be_read(browser, home, dark):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        open_page(browser, home, width=390)
        click(browser, "#run")
        answers(browser, 1)
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(overflow) <= 0
        picture(browser, f"playground_phone_{'dark' if dark else 'light'}.png")
        assert browser.execute_script(CONTRAST) >= 4.5
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# The least contrast of any text with its background (WCAG 2).
CONTRAST = """
const light = (c) => c.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92
  : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
function ground(node) {
  const [r, g, b, a = 1] = parts(getComputedStyle(node).backgroundColor);
  if (a === 1 || !node.parentElement) return a === 1 ? [r, g, b] : [255, 255, 255];
  return ground(node.parentElement).map((v, i) => v * (1 - a) + [r, g, b][i] * a);
}
const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
  && !e.disabled && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
return Math.min(...texts.map((e) => {
  const [a, b] = [light(parts(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}));
"""
