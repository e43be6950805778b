"""Formulas and alphas of single requests: rows of one batch that are combined in several ways."""

import json
from dataclasses import replace
from functools import cache, partial

import pytest
import requests
import yaml

import proxytune
from proxytune import api
from proxytune.engine.combining import Combination
from proxytune.errors import UserError
from proxytune.files import shipped as shipped_files
from proxytune.formula import SHIPPED, gated, shipped
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from proxytune.records import make_decoding
from proxytune.server import ServerSettings, create_app
from proxytune.server.protocol import FormulaChoice
from proxytune.vllm.checks import check_combination
from tests.api_triple import over_http, save_triple, served
from tests.serving import running
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Natalia sold clips to", "def add(a, b):", "Question: What is"]
KEYS = ["a", "b", "c"]  # the same noise, whichever members read a prompt
TOKENIZER = tiny_tokenizer()
ASKED = [  # formula, its settings, alpha
    (None, {}, None),
    ("gated", {"threshold": 0.06}, None),
    ("proxy", {}, 2.0),
    ("contrastive", {"plausibility": 0.2}, 0.5),
    ("gated", {"threshold": 0.06}, 1.5),
    ("dexperts", {"top_k": 3, "top_p": 1.0}, None),
    ("dexperts", {}, -0.5),
    (None, {}, 0.0),
]


@cache
def models():
    return [tiny_model(seed=0), tiny_model(seed=1, hidden=16), tiny_model(seed=2, hidden=16)]


def triple(**settings) -> api.Generator:
    return api.load(*models(), **{"alpha": 0.7, "tokenizer": TOKENIZER} | settings)


def alone(name, settings, alpha) -> api.Generator:
    """A system of this formula and alpha only."""
    base, expert, antiexpert = models()
    formula = None if name is None else shipped(name, settings)
    return api.load(
        base,
        None if name == "contrastive" else expert,
        antiexpert,
        alpha=0.7 if alpha is None else alpha,
        formula=formula,
        tokenizer=TOKENIZER,
    )


def run(generator, asked, **how):
    """The token ids of every prompt under each of some combinations, all in one loop."""
    settings = {k: how.pop(k) for k in ("temperature", "top_p", "ignore_eos") if k in how}
    loop, found, index = generator.loop(**how), {}, 0
    for name, options, alpha in asked:
        own = generator.combination(None if name is None else shipped(name, options), alpha)
        decoding = make_decoding(max_new_tokens=14, **settings)
        for request in generator.requests(PROMPTS, decoding, seed=3, sample_keys=KEYS):
            loop.add(replace(request, index=index, combination=own))
            index += 1
    while loop.busy:
        found |= {each.index: each.token_ids for each in loop.step()}
    return [found[i] for i in range(index)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.slow
def test_rows_of_several_formulas_are_those_of_systems_of_their_own(temperature):
    want = [
        each.token_ids
        for asked in ASKED
        for each in alone(*asked).generate(
            PROMPTS,
            max_new_tokens=14,
            temperature=temperature,
            seed=3,
            sample_keys=KEYS,
            speculative=False,
        )
    ]
    assert len({*map(tuple, want)}) > len(want) / 2
    together = triple()
    for how in ({"speculative": False}, {"speculative": 3}, {"speculative": 3, "batch_size": 5}):
        assert run(together, ASKED, temperature=temperature, **how) == want


def test_a_models_two_prompts_take_guidance_and_another_model_does_not():
    own = api.load(models()[0], formula=proxytune.formula.guidance, tokenizer=TOKENIZER)
    asked = [("guidance", {}, 1.0), ("contrastive", {}, 0.5), (None, {}, 1.0)]
    ids = run(own, asked, temperature=1.0)  # both prompts are one text: contrastive only flattens
    assert ids[:3] == ids[6:] and ids[3:6] != ids[:3]
    with pytest.raises(UserError, match="expert, antiexpert; there is antiexpert"):
        own.combination(shipped("gated"))
    with pytest.raises(UserError, match="two prompts of one model"):
        triple().combination(shipped("guidance"))


def pairs(alpha) -> api.Generator:
    base, expert, antiexpert = models()
    more = tiny_model(seed=4, hidden=16)
    given = {"math": (expert, antiexpert), "chat": (more, antiexpert)}
    return api.load(base, pairs=given, alpha=alpha, tokenizer=TOKENIZER)


@pytest.mark.slow
def test_each_pair_may_have_its_own_alpha():
    together = pairs({"math": 0.4, "chat": 0.9})
    asked = [
        (None, {}, None),
        (None, {}, {"math": 1.3}),
        ("proxy", {}, {"chat": 0.1, "math": 0.2}),
        (None, {}, 0.5),
    ]
    alphas = [
        {"math": 0.4, "chat": 0.9},
        {"math": 1.3, "chat": 0.9},
        {"math": 0.2, "chat": 0.1},
        {"math": 0.5, "chat": 0.5},
    ]
    want = [
        each.token_ids
        for alpha in alphas
        for each in pairs(alpha).generate(PROMPTS, max_new_tokens=14)
    ]
    assert run(together, asked, speculative=3) == want
    with pytest.raises(UserError, match=r"alpha of 'maths'.*the pairs are math, chat"):
        together.combination(alpha={"maths": 1.0})
    with pytest.raises(UserError, match="combines the base with expert, antiexpert; there is"):
        together.combination(shipped("dexperts"))


def test_a_request_may_leave_a_formula_of_the_users_own():
    def mine(base, expert, antiexpert):
        return base.float() + 0.2 * (expert.float() - antiexpert.float())

    own = triple(formula=mine, alpha=1.0)
    ids = run(own, [(None, {}, None), ("proxy", {}, None), ("proxy", {}, 0.2)])
    assert ids[3:6] == [g.token_ids for g in triple(alpha=1.0).generate(PROMPTS, max_new_tokens=14)]
    assert ids[:3] == ids[6:]
    with pytest.raises(UserError, match=r"leave alpha=0\.5 out"):
        own.combination(alpha=0.5)


def test_the_servers_formula_by_its_name_is_the_same_one():
    own = triple(formula=partial(gated, threshold=0.5))
    assert own.combination(shipped("gated", {"threshold": 0.5})).formula is own.formula
    assert own.combination(shipped("gated")).formula is not own.formula
    assert shipped("gated", {"threshold": 0.4}) is shipped("gated")


def test_settings_are_those_of_conf():
    for name, (function, settings) in SHIPPED.items():
        written = yaml.safe_load((shipped_files("conf") / "formula" / f"{name}.yaml").read_text())
        assert written.pop("_target_").endswith(f".{function.__name__}")
        assert written == settings
    files = {path.stem for path in (shipped_files("conf") / "formula").glob("*.yaml")}
    assert files == SHIPPED.keys()
    known = {key for _, settings in SHIPPED.values() for key in settings}
    assert FormulaChoice.model_fields.keys() - {"name"} == known
    described = FormulaChoice.model_json_schema()["properties"]["name"]["description"]
    assert all(name in described for name in SHIPPED)


# -- in the server --------------------


@pytest.fixture(scope="module")
def url():
    systems = {
        "tiny": triple(),
        "pairs": pairs({"math": 0.4, "chat": 0.9}),
        "single": api.load(models()[0], tokenizer=TOKENIZER),
    }
    with running(create_app(systems, ServerSettings(), speculative=3)) as url:
        yield url


def post(url, path="completions", **body):
    prompt = {"prompt": PROMPTS[0]} if path == "completions" else {}
    usual = {"model": "tiny", "temperature": 0, "max_tokens": 14, **prompt}
    answer = requests.post(f"{url}/{path}", json=usual | body, timeout=60)
    return answer.status_code, answer.json()


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("name", "settings", "alpha"), ASKED[1:7])
def test_a_completion_has_the_formula_that_it_asks_for(url, name, settings, alpha):
    more = {} if alpha is None else {"alpha": alpha}
    status, answer = post(url, formula={"name": name, **settings}, **more)
    assert status == 200, answer
    (want,) = alone(name, settings, alpha).generate(PROMPTS[:1], max_new_tokens=14)
    assert answer["choices"][0]["text"] == want.text


def test_prompts_are_rated_by_it_too(url):
    formula = {"name": "dexperts", "top_k": 3, "top_p": 1.0}
    _, answer = post(url, formula=formula, alpha=2.0, prompt_logprobs=0, max_tokens=0)
    rated = answer["choices"][0]["prompt_logprobs"]
    own = alone("dexperts", {"top_k": 3, "top_p": 1.0}, 2.0)
    ids = own.encode(PROMPTS[0])["base"]
    logprobs = own.logits(ids).log_softmax(-1)
    for place, entry in enumerate(rated[1:], start=1):
        want = max(-9999.0, float(logprobs[place - 1, ids[place]]))
        assert entry[str(ids[place])]["logprob"] == pytest.approx(want, abs=1e-4)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_the_other_endpoints_take_it(url, path):
    turn = [{"role": "user", "content": PROMPTS[0]}]
    body = {"messages": turn} if path == "chat/completions" else {"input": turn}
    limit = {} if path == "chat/completions" else {"max_output_tokens": 14, "max_tokens": None}
    texts = set()
    for formula in (None, {"name": "contrastive"}, {"name": "gated", "threshold": 0.0}):
        status, answer = post(url, path, **body, **limit, formula=formula, alpha=1.5)
        assert status == 200, answer
        texts.add(json.dumps(answer.get("choices") or answer["output"][0]["content"]))
    assert len(texts) == 3


def test_pairs_take_alphas_by_name(url):
    _, answer = post(url, model="pairs", alpha={"math": 1.3})
    (want,) = pairs({"math": 1.3, "chat": 0.9}).generate(PROMPTS[:1], max_new_tokens=14)
    assert answer["choices"][0]["text"] == want.text


KNOWN = "proxy, dexperts, gated, contrastive, guidance"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"formula": {"name": "gate"}}, "formula", f"no formula 'gate'; there is {KNOWN}"),
        ({"formula": {"name": "os.system"}}, "formula", "no formula 'os.system'"),
        ({"formula": {"name": "proxy", "_target_": "os.system"}}, "formula", "'formula._target_'"),
        ({"formula": {}}, "formula", "formula.name is missing"),
        ({"formula": "gated"}, "formula", '{"name": "gated"'),
        ({"formula": {"name": "gated", "top_k": 3}}, "formula", "has no top_k; its settings are"),
        ({"formula": {"name": "proxy", "top_k": 3}}, "formula", "it has no settings"),
        ({"formula": {"name": "gated", "threshold": 1.5}}, "formula", "not 1.5"),
        ({"formula": {"name": "gated", "threshold": "1"}}, "formula", "valid number"),
        ({"formula": {"name": "gated", "threshold": True}}, "formula", "valid number"),
        ({"formula": {"name": "dexperts", "top_p": 0}}, "formula", "top_p=0"),
        ({"formula": {"name": "dexperts", "top_k": -1}}, "formula", "top_k=-1"),
        ({"formula": {"name": "dexperts", "top_k": 2.5}}, "formula", "formula.top_k: "),
        ({"formula": {"name": "contrastive", "plausibility": 0}}, "formula", "plausibility"),
        ({"formula": {"name": "guidance"}}, "formula", "two prompts of one model"),
        ({"formula": {"name": "proxy"}, "model": "single"}, "formula", "needs a triple"),
        ({"formula": {"name": "gated"}, "model": "pairs"}, "formula", "there is math_expert"),
        ({"alpha": {"math": 1.0}}, "alpha", "alpha of 'math'"),
        ({"alpha": {"maths": 1.0}, "model": "pairs"}, "alpha", "the pairs are math, chat"),
        ({"alpha": {"math": "1"}, "model": "pairs"}, "alpha", "-100 to 100"),
        ({"alpha": {"math": 101}, "model": "pairs"}, "alpha", "-100 to 100"),
        ({"alpha": {str(i): 1.0 for i in range(65)}, "model": "pairs"}, "alpha", "65 pairs"),
        ({"alpha": 0.5, "model": "single"}, "alpha", "needs a triple"),
    ],
)
def test_what_cannot_be_is_refused(url, body, param, words):
    status, answer = post(url, **body)
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]


# -- variables of chat templates --------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is defined and think %}hm{{ depth }}"
    "{% endif %}{% endif %}"
)
TURNS = [{"role": "user", "content": "Hello"}]


def chats() -> api.Generator:
    """An expert whose template reads variables, an antiexpert whose template reads others."""

    def member(model, template=None, **variables):
        tokenizer = tiny_tokenizer(chat_template=template)
        fmt = PromptFormat(kind="chat" if template else "raw", template_kwargs=variables)
        return LoadedModel(model, tokenizer, ModelSpec("tiny", format=fmt))

    base, expert, antiexpert = models()
    return api.load(
        member(base),
        member(expert, TEMPLATE, depth=1),
        member(antiexpert, TEMPLATE.replace("depth", "width")),
        alpha=1.5,
    )


def test_a_conversations_template_variables_reach_the_members_that_read_them(url):
    own = chats()
    prompts = {
        "base": "Hello",
        "expert": "<|user|>Hello<|assistant|>hm2",
        "antiexpert": "<|user|>Hello<|assistant|>hm3",
    }
    ids = {r: TOKENIZER(t, add_special_tokens=r == "base")["input_ids"] for r, t in prompts.items()}
    variables = {"think": True, "depth": 2, "width": 3}
    assert own.encode(TURNS, variables) == ids
    (want,) = own.generate([ids], max_new_tokens=14)
    (plain,) = own.generate([TURNS], max_new_tokens=14)
    with running(create_app({"tiny": own}, speculative=3)) as home:

        def ask(**more):
            return post(home, "chat/completions", messages=TURNS, **more)

        def respond(**more):
            given = {"input": TURNS, "temperature": 0, "max_output_tokens": 14}
            return requests.post(f"{home}/responses", json=given | more).json()

        answer = respond(chat_template_kwargs=variables)
        assert answer["output"][0]["content"][0]["text"] == want.text
        answer = respond(chat_template_kwargs={"thinks": True})
        assert answer["error"]["param"] == "chat_template_kwargs"
        _, answer = ask(chat_template_kwargs=variables)
        assert answer["choices"][0]["message"]["content"] == want.text != plain.text
        for nothing in ({}, None, {"think": False}):
            _, answer = ask(chat_template_kwargs=nothing)
            assert answer["choices"][0]["message"]["content"] == plain.text
        for wrong, words in (
            ({"thinks": True}, "no member's chat template reads thinks"),
            ({"add_generation_prompt": False}, "add_generation_prompt is no variable"),
            ({"tokenize": True}, "tokenize is no variable"),
            ([], "dictionary"),
            ("think", "dictionary"),
            (True, "dictionary"),
            ({str(i): 1 for i in range(65)}, "65 variables"),
        ):
            status, answer = ask(chat_template_kwargs=wrong)
            assert status == 400 and words in answer["error"]["message"], (wrong, answer)
            assert answer["error"]["param"] == "chat_template_kwargs"
    status, answer = post(url, "chat/completions", messages=TURNS, chat_template_kwargs=variables)
    assert status == 400 and "all read raw text" in answer["error"]["message"]
    status, answer = post(url, chat_template_kwargs={})
    assert status == 400 and "unknown field" in answer["error"]["message"]


@pytest.mark.slow
def test_a_base_that_lists_few_tokens_has_one_formula(tmp_path):
    folder = save_triple(tmp_path)
    with served(folder) as upstream:
        few = over_http(folder, upstream, top_logprobs=5)
        with running(create_app({"tiny": few})) as url:
            status, answer = post(url, formula={"name": "contrastive"})
            assert status == 400
            assert "lists its likeliest tokens only" in answer["error"]["message"]
            _, same = post(url, formula={"name": "proxy"}, alpha=1.5)
            _, plain = post(url, alpha=1.5)
            assert same["choices"][0]["text"] == plain["choices"][0]["text"]


def test_vllm_takes_proxy_tuning_alone():
    """The rule of `VllmGenerator.combination`, without vLLM."""
    alphas = {"alpha": 1.0}

    def own(name, alpha):
        return Combination(shipped(name), ("base", "expert", "antiexpert"), {"alpha": alpha})

    check_combination(own("proxy", 0.5), alphas, per_request=True)
    check_combination(own("proxy", 1.0), alphas, per_request=False)
    with pytest.raises(UserError, match=r"alpha=0\.5: vLLM's model runner V1"):
        check_combination(own("proxy", 0.5), alphas, per_request=False)
    with pytest.raises(UserError, match="formula gated needs engine=own"):
        check_combination(own("gated", 1.0), alphas, per_request=True)
