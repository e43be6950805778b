"""Faults injected for real, the budget, resuming, and refusals before anything is loaded."""

import json
import threading
import time
from typing import Any

import pytest
import requests

from proxytune import api
from proxytune.errors import Unanswered
from proxytune.loading.load import check_triple
from proxytune.loading.spec import ModelSpec
from proxytune.server import ServerSettings, create_app
from tests.api_triple import PROMPTS, base_at, client_of, in_process, over_http, save_triple, served
from tests.faulty import Faulty, faulty
from tests.serving import running
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("impatient")

SETTINGS: dict[str, Any] = {"top_logprobs": 20, "timeout_s": 30, "max_concurrency": 4}


@pytest.fixture(scope="module")
def undisturbed(folder, url) -> list[list[int]]:
    return write(over_http(folder, url, top_logprobs=20))


def write(generator: api.Generator) -> list[list[int]]:
    return [each.token_ids for each in generator.generate(PROMPTS, max_new_tokens=8)]


def nothing_came_twice(proxy: Faulty) -> None:
    assert len(set(proxy.prompts())) == len(proxy.prompts())


@pytest.mark.thinned(1)
@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "malformed", "empty", "slow"])
def test_a_fault_is_waited_out(folder, url, undisturbed, tmp_path, fault):
    # a busy machine's honest answers must not be taken for slow ones
    settings = SETTINGS | ({"timeout_s": 1.0} if fault == "slow" else {})
    with faulty(url, slowness=1.5) as proxy:
        cache = str(tmp_path / "api.sqlite")
        remote = over_http(folder, proxy.url, cache=cache, **settings)
        hits = proxy.hits
        proxy.delivered.clear()
        proxy.faults += [fault, None, fault, fault, None, fault]
        assert write(remote) == undisturbed
        assert not proxy.faults
        assert proxy.hits - hits == len(proxy.delivered) + 4
        nothing_came_twice(proxy)


@pytest.mark.slow
def test_everybody_waits_as_long_as_the_server_asks(folder, url, undisturbed):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, **SETTINGS)
        proxy.faults += [(429, "0.7")]
        start = time.monotonic()
        assert write(remote) == undisturbed
        assert time.monotonic() - start > 0.7


@pytest.mark.slow
def test_a_server_may_die_and_come_back(folder, url, undisturbed, tmp_path):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, cache=str(tmp_path / "a"), **SETTINGS)
        proxy.delivered.clear()  # the probe asks for one position in two ways
        finished = []

        def kill(generation) -> None:
            finished.append(generation)
            if len(finished) == 1:
                proxy.stop()

        def revive() -> None:
            while not finished:
                time.sleep(0.01)
            time.sleep(0.4)
            proxy.start()

        thread = threading.Thread(target=revive)
        thread.start()
        got = remote.generate(PROMPTS, max_new_tokens=8, batch_size=2, on_finish=kill)
        thread.join()
        assert [each.token_ids for each in got] == undisturbed
        nothing_came_twice(proxy)


def test_a_server_that_stays_away_is_given_up_in_one_line(folder, url):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, retry_for_s=0.3, **SETTINGS)
        proxy.faults += [500] * 200
        with pytest.raises(Unanswered, match=r"did not answer for 0.3 seconds.*the same command"):
            write(remote)


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("fault", "status"), [(500, 503), (400, 502)])
def test_a_proxy_that_is_served_itself_says_that_the_base_is_gone(folder, url, fault, status):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, retry_for_s=0.3, **SETTINGS)
        with running(create_app({"proxy": remote}, ServerSettings())) as own:
            body = {"prompt": "4", "max_tokens": 3, "temperature": 0}
            proxy.faults += [fault] * 200
            answer = requests.post(f"{own}/completions", json=body, timeout=60)
            assert answer.status_code == status, answer.text
            assert proxy.url in answer.json()["error"]["message"]
            proxy.faults.clear()
            assert requests.post(f"{own}/completions", json=body, timeout=60).ok


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.slow
def test_the_budget_stops_and_a_larger_one_goes_on(folder, url, undisturbed, tmp_path, blocks):
    settings = SETTINGS | {"cache": str(tmp_path / "api.sqlite"), "blocks": blocks}
    with faulty(url) as proxy:
        unlimited = over_http(folder, proxy.url, **SETTINGS, blocks=blocks, max_requests=1000)
        probe = proxy.hits
        write(unlimited)
        whole = proxy.hits
        proxy.hits = 0
        proxy.delivered.clear()
        for limit in (probe + 2, probe + 5, whole):
            remote = over_http(folder, proxy.url, max_requests=limit, **settings)
            proxy.delivered.clear()  # the probe asks for one position in two ways
            if limit == whole:
                assert write(remote) == undisturbed
                break
            with pytest.raises(ValueError, match=f"max_requests={limit} is spent .*goes on"):
                write(remote)
            assert proxy.hits == limit
        nothing_came_twice(proxy)
        assert proxy.hits <= whole


def test_money_and_tokens_are_budgets_too(folder, url):
    priced = {"prompt_price": 1.0, "completion_price": 2.0}
    probe = client_of(over_http(folder, url, **SETTINGS, **priced, max_cost=100)).spent
    most = round(probe.cost + 0.06, 2)
    remote = over_http(folder, url, **SETTINGS, **priced, max_cost=most)
    with pytest.raises(ValueError, match=rf"max_cost={most:g} is spent \(0.\d+ of money"):
        write(remote)
    spent = client_of(remote).spent
    assert probe.cost < spent.cost <= most
    assert spent.tokens / 1000 < spent.cost < 2 * spent.tokens / 1000
    limit = int(probe.tokens) + 60
    remote = over_http(folder, url, **SETTINGS, max_tokens=limit)
    with pytest.raises(ValueError, match=f"max_tokens={limit} is spent"):
        write(remote)
    assert probe.tokens < client_of(remote).spent.tokens <= limit


@pytest.mark.slow
def test_the_second_time_costs_nothing(folder, url, undisturbed, tmp_path):
    cache = str(tmp_path / "api.sqlite")
    with faulty(url) as proxy:
        assert write(over_http(folder, proxy.url, cache=cache, **SETTINGS)) == undisturbed
        hits = proxy.hits
        assert write(over_http(folder, proxy.url, cache=cache, **SETTINGS)) == undisturbed
        assert proxy.hits == hits  # not even the probe


# -- refusals --------------------


@pytest.fixture
def without_weights(tmp_path):
    """A triple whose small models would fail to load: whoever gets that far has come too far."""
    save_triple(tmp_path)
    for name in ("expert", "antiexpert"):
        (tmp_path / name / "model.safetensors").unlink()
    return tmp_path


def load_all(folder, url: str, **settings: Any) -> api.Generator:
    small = (str(folder / name) for name in ("expert", "antiexpert"))
    return api.load(base_at(folder, url, **settings), *small)


def refusal(folder, url: str, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_all(folder, url, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_key_is_one_line_before_anything_is_loaded(without_weights, monkeypatch):
    with served(without_weights, api_key="right") as url:
        monkeypatch.setenv("SOME_KEY", "wrong")
        line = refusal(without_weights, url, api_key_env="SOME_KEY")
        assert "does not accept the key" in line
        assert "check the environment variable SOME_KEY" in line
        assert "api_key_env=" in refusal(without_weights, url)
        monkeypatch.delenv("SOME_KEY")
        assert "SOME_KEY is empty" in refusal(without_weights, url, api_key_env="SOME_KEY")
        monkeypatch.setenv("SOME_KEY", "right")
        with pytest.raises(ValueError, match="no usable weights"):
            load_all(without_weights, url, api_key_env="SOME_KEY")


def test_nobody_there_is_one_line_before_anything_is_loaded(without_weights):
    line = refusal(without_weights, "http://127.0.0.1:9/v1")
    assert "nobody answers at http://127.0.0.1:9/v1" in line
    assert "triple.base.api.base_url" in line


def test_a_model_that_the_server_lacks(without_weights):
    with served(without_weights) as url:
        line = refusal(without_weights, url, model="another")
        assert "has no model 'another'; it has tiny" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_logprobs": 0}, "top_logprobs=0"),
        ({"endpoint": "telnet"}, "endpoint='telnet'"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"prize": 3}, "unknown key 'prize'"),
        ({"model": ""}, "has no model"),
    ],
)
def test_bad_settings_are_refused(folder, settings, said):
    assert said in refusal(folder, "http://127.0.0.1:9/v1", **settings)


def test_only_the_base_may_be_elsewhere(folder, tmp_path):
    base = ModelSpec(str(folder / "base"))
    elsewhere = ModelSpec(str(folder / "expert"), api={"base_url": "http://x", "model": "m"})
    with pytest.raises(ValueError, match="the expert cannot be behind an API"):
        check_triple({"base": base, "expert": elsewhere, "antiexpert": base})


def test_another_vocabulary_is_refused_before_the_server_is_asked(folder, tmp_path):
    path = save_tiny(tmp_path / "other") / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    base = ModelSpec(str(tmp_path / "other"), api={"base_url": "http://127.0.0.1:9", "model": "m"})
    with pytest.raises(ValueError, match="vocabularies differ"):
        check_triple({"base": base, "expert": ModelSpec(str(folder / "expert"))})


def test_in_process_and_over_http_agree(folder, undisturbed):
    """The reference of this file, where the 20 listed tokens decide."""
    want = in_process(folder).generate(PROMPTS, max_new_tokens=8)
    assert any(each.token_ids == got for each, got in zip(want, undisturbed, strict=True))
