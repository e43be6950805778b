"""The decode loop: ends, stop strings, scheduling, shared prefills, memory running out."""

import tracemalloc
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

import proxytune
from proxytune.engine.choice import choose_from
from proxytune.engine.loop import DecodeLoop
from proxytune.engine.memory import row_budget
from proxytune.engine.rows import FULL, Request, Row, Shared, traces_of
from proxytune.engine.sampling import Sampler
from proxytune.engine.system import Pass
from proxytune.engine.text import GrowingText
from proxytune.records import make_decoding

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model("llama", 1)
TRIPLE = (tiny_model("llama", 1, hidden=48), tiny_model("llama", 2), tiny_model("llama", 3))


class Watched:
    """A system that counts its calls and may run out of memory."""

    def __init__(self, member, most_rows=None):
        self.member = member
        self.most_rows = most_rows
        self.prefilled = []
        self.row_steps = 0
        self.steps = 0

    def __getattr__(self, name):
        return getattr(self.member, name)

    def _check(self, rows):
        if self.most_rows is not None and rows > self.most_rows:
            raise torch.OutOfMemoryError("injected: out of memory")

    def prefill(self, prompts, alphas=None, ahead=0):
        self._check(len(self.member.lengths) + len(prompts))
        self.prefilled += [len(prompt["base"]) for prompt in prompts]
        return self.member.prefill(prompts, alphas, ahead)

    def step(self, tokens):
        self._check(len(tokens))
        self.steps += 1
        self.row_steps += len(tokens)
        return self.member.step(tokens)

    def join(self, tokens, prompts, alphas=None):
        self._check(len(tokens) + len(prompts))
        self.prefilled += [len(prompt["base"]) for prompt in prompts]
        self.steps += 1
        self.row_steps += len(tokens)
        return self.member.join(tokens, prompts, alphas)


def watched(model=MODEL, **more):
    generator = proxytune.load(model, tokenizer=TOKENIZER)
    generator.system = Watched(generator.system, **more)
    return generator, generator.system


def prompts_of(count):
    return [[1] + [10 + i] * (i % 7 + 1) for i in range(count)]


def test_every_row_writes_what_it_writes_alone():
    generator, _ = watched()
    prompts = prompts_of(12)
    alone = [generator.generate([prompt], max_new_tokens=9)[0].token_ids for prompt in prompts]
    for batch_size in (1, 4, "auto"):
        together = generator.generate(prompts, max_new_tokens=9, batch_size=batch_size)
        assert [each.token_ids for each in together] == alone
        assert [each.prompt_index for each in together] == list(range(12))


def test_free_rows_are_filled_at_once():
    """No padding: every step runs full rows until the last prompts, whatever their lengths."""
    generator, system = watched()
    stop_at = ["a", "e", "t", " "]
    done = generator.generate(
        prompts_of(40), max_new_tokens=60, temperature=1.0, stop=stop_at, batch_size=8
    )
    lengths = [len(each.token_ids) for each in done]
    assert max(lengths) > 3 * (sum(lengths) / 40)  # a static batch would wait for the longest
    assert system.row_steps == sum(lengths) - 40 + sum(d.finish_reason == "eos" for d in done)
    assert system.steps < system.row_steps / 8 + 2 * max(lengths)


def test_the_samples_of_a_prompt_share_its_prefill():
    generator, system = watched()
    for batch_size in (1, 3, 16):
        system.prefilled.clear()
        got = generator.generate(
            [[1, 40, 41], [1, 50]],
            n=7,
            temperature=1.0,
            stop="a",
            max_new_tokens=12,
            batch_size=batch_size,
        )
        assert system.prefilled == [3, 2]
        assert [(each.prompt_index, each.sample) for each in got] == [
            (prompt, sample) for prompt in range(2) for sample in range(7)
        ]
        texts = [each.text for each in got]
        assert len(set(texts)) > 8
        if batch_size == 1:
            want = texts
        assert texts == want


def test_a_seed_names_a_sample():
    generator, _ = watched()
    setting = {"temperature": 1.0, "max_new_tokens": 8}
    one = generator.generate(["hi", "you", "hi"], seed=1, **setting)
    assert one == generator.generate(["hi", "you", "hi"], seed=1, **setting)
    assert one[0].token_ids != generator.generate(["hi"], seed=2, **setting)[0].token_ids
    assert one[0].token_ids == generator.generate(["hi"], seed=1, **setting)[0].token_ids
    assert one[0].token_ids != one[2].token_ids  # the same prompt again is another sample
    keyed = generator.generate(["you", "hi"], seed=1, sample_keys=["b", "a"], **setting)
    turned = generator.generate(["hi", "you"], seed=1, sample_keys=["a", "b"], **setting)
    assert [each.token_ids for each in keyed] == [each.token_ids for each in turned][::-1]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("most_rows", [1, 3])
def test_out_of_memory_halves_the_batch_and_changes_no_text(most_rows, caplog):
    want = watched()[0].generate(prompts_of(9), max_new_tokens=10, temperature=0.7, n=2)
    generator, _ = watched(most_rows=most_rows)
    got = generator.generate(prompts_of(9), max_new_tokens=10, temperature=0.7, n=2)
    assert got == want
    assert "out of memory" in caplog.text


def test_out_of_memory_in_the_middle_of_decoding():
    want = watched()[0].generate(prompts_of(6), max_new_tokens=20)
    generator, system = watched()
    plain_step = system.step

    def step(tokens):
        if system.steps == 7 and len(tokens) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return plain_step(tokens)

    system.step = step
    assert generator.generate(prompts_of(6), max_new_tokens=20) == want


def test_memory_that_does_not_do_for_one_row_is_an_error():
    generator, _ = watched(most_rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        generator.generate([[1, 2, 3]], max_new_tokens=4)
    assert generator.system.lengths == []


def test_other_errors_are_not_taken_for_missing_memory():
    generator, system = watched()
    system.step = lambda tokens: (_ for _ in ()).throw(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        generator.generate([[1, 2, 3]], max_new_tokens=4)


def test_requests_are_taken_as_they_are_needed():
    """A long list of prompts has as few rows, waiting or running, as a short one."""
    generator, system = watched()
    taken = 0
    decoding = proxytune.api.make_decoding(max_new_tokens=3)
    requests = generator.requests(prompts_of(100), decoding)

    def source():
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    ahead = 0
    for done, _ in enumerate(generator.loop(4).run(source()), start=1):
        ahead = max(ahead, taken - done)
    assert taken == 100
    assert ahead <= 4 + 4 + 4
    assert system.member.member.cache.slots == 0  # the memory is freed at the end


def test_eos_ids_are_those_of_every_source():
    model = tiny_model("llama", 1)
    first = proxytune.load(model, tokenizer=TOKENIZER).generate([[1, 40]], max_new_tokens=6)[0]
    model.generation_config.eos_token_id = [299, first.token_ids[3]]
    generator = proxytune.load(model, tokenizer=TOKENIZER)
    assert generator.eos_ids == {2, 299, first.token_ids[3]}
    cut = first.token_ids.index(first.token_ids[3])
    got = generator.generate([[1, 40]], max_new_tokens=6)[0]
    assert got.token_ids == first.token_ids[:cut]
    assert got.finish_reason == "eos"
    assert first.finish_reason == "length"


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    stops=st.lists(
        st.text("abcdefghijklmnopqrstuvwxyz 1_(\n", min_size=1, max_size=3), min_size=1, max_size=3
    ),
    seed=st.integers(0, 3),
    speculative=st.sampled_from([False, 4]),
)
def test_text_ends_before_the_first_stop_string(stops, seed, speculative):
    generator = STOPPING
    setting = {"temperature": 1.5, "max_new_tokens": 24, "seed": seed, "sample_keys": ["k"]}
    free = without_stops(seed)
    got = generator.generate([[1, 40]], stop=stops, speculative=speculative, **setting)[0]
    ends = [free.raw_text.find(stop) for stop in stops if stop in free.raw_text]
    if not ends:
        assert got == free
        return
    assert got.finish_reason == "stop"
    assert got.text == free.raw_text[: min(ends)]
    assert free.token_ids[: len(got.token_ids)] == got.token_ids
    assert any(stop in got.raw_text for stop in stops)
    streamed = generator.stream(
        [1, 40], stop=stops, temperature=1.5, max_new_tokens=24, seed=seed, sample_key="k"
    )
    assert "".join(streamed) == got.text


STOPPING = proxytune.load(*TRIPLE, tokenizer=TOKENIZER)


@cache
def without_stops(seed):
    setting = {"temperature": 1.5, "max_new_tokens": 24, "seed": seed, "sample_keys": ["k"]}
    return STOPPING.generate([[1, 40]], **setting)[0]


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=40), st.text(min_size=1, max_size=60))
def test_text_grows_to_what_decoding_all_of_it_gives(prompt, completion):
    context = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    ids = TOKENIZER(completion, add_special_tokens=False)["input_ids"]
    text = GrowingText(TOKENIZER, context)
    pieces = [text.push(token) for token in ids]
    pieces.append(text.finish())
    assert "".join(pieces) == text.raw == TOKENIZER.decode(ids)
    # A character that is not complete yet is not shown: these texts have no other "\ufffd".
    assert "\ufffd" not in completion or "\ufffd" in text.raw


def test_an_incomplete_character_is_shown_at_the_end():
    ids = TOKENIZER("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    text = GrowingText(TOKENIZER, [1])
    assert text.push(ids[0]) == ""
    assert text.finish() == "\ufffd"
    assert text.raw == "\ufffd"


def test_growing_text_costs_the_same_per_token():
    calls = []

    class Counting:
        def decode(self, ids, **_):
            calls.append(len(ids))
            return TOKENIZER.decode(ids)

    text = GrowingText(Counting(), [1], ["zz"])
    for _ in range(500):
        text.push(40)
    assert max(calls) < 25
    assert len(calls) <= 2 * 500 + 1


def test_row_budget_goes_by_memory_and_length():
    generator, _ = watched()
    members = list(generator.system.members.values())
    assert row_budget(members, 7)(10**9) == 7
    auto = row_budget(members)
    assert auto(10**15) == 1
    assert 1 < auto(100) <= 32


class Cheap:
    """A system without a model: it remembers lengths, and every token is followed by the next."""

    vocab_size = 8

    def __init__(self):
        self.lengths = []
        self.steps = 0
        self.most_tokens = 0

    joins = False

    def prefill(self, prompts, alphas=None, ahead=0):
        self.lengths += [len(prompt["base"]) for prompt in prompts]
        return Pass(torch.eye(8)[[prompt["base"][-1] for prompt in prompts]].roll(1, -1))

    def step(self, tokens):
        self.steps += 1
        self.lengths = [length + 1 for length in self.lengths]
        self.most_tokens = max(self.most_tokens, sum(self.lengths))
        return Pass(torch.eye(8)[tokens % 8].roll(1, -1))

    def keep(self, rows):
        self.lengths = [self.lengths[row] for row in rows]

    def clear(self):
        self.lengths = []


@pytest.mark.slow
def test_ten_thousand_prompts_need_the_memory_of_a_hundred_and_a_hundred_times_the_time():
    decoding = make_decoding(max_new_tokens=4)
    sampler = Sampler(decoding)

    def requests(count):
        for i in range(count):
            yield Request(
                i, {"base": [i % 8]}, [i % 8], str(i), 0, decoding, sampler, frozenset(), 2 + i % 3
            )

    def measure(count):
        system = Cheap()
        tracemalloc.start()
        tokens = sum(
            len(each.token_ids)
            for each in DecodeLoop(system, lambda _: 16, None).run(requests(count))
        )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert tokens == sum(2 + i % 3 for i in range(count))
        return peak, system

    measure(20)  # memory that the first use loads does not count
    few, of_few = measure(100)
    many, of_many = measure(10_000)
    assert many < few + 200_000  # 20 bytes per prompt would be too many
    assert of_many.most_tokens <= 16 * 5 and of_few.most_tokens <= 16 * 5
    assert of_many.steps == pytest.approx(100 * of_few.steps, rel=0.3)


def test_a_traces_entries_are_computed_for_a_whole_pass_as_for_each_place_alone():
    torch.manual_seed(0)
    members = {role: torch.randn(5, 50) for role in ("base", "expert", "antiexpert")}
    seen = Pass(torch.randn(5, 50), members)
    tokens = [3, 49, 0, 17, FULL]  # a context that is full has an entry that nobody reads
    entries = traces_of(seen, tokens, 4)
    assert len(entries) == 5
    for place, token in enumerate(tokens[:4]):
        entry = entries[place]
        assert entry["id"] == token
        assert list(entry["p"]) == list(entry["top"]) == ["system", *members]
        for role, logits in {"system": seen.logits, **members}.items():
            probs = logits[place].softmax(-1)
            assert entry["p"][role] == round(float(probs[token]), 6)
            best = sorted(range(50), key=lambda i: -float(probs[i]))[:4]
            assert entry["top"][role] == [[i, round(float(probs[i]), 6)] for i in best]


def test_where_no_token_is_chosen_the_trace_has_no_entry():
    """A report refuses a trace with the id -1; an API that lists no allowed token led to one."""
    decoding = make_decoding(max_new_tokens=4)
    sampler = Sampler(decoding, banned=[1])
    ids = {"base": [2]}
    request = Request(0, ids, [2], "k", 0, decoding, sampler, frozenset(), 4, record=2)
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    row = Row(Shared(request))
    choose_from(Pass(logits, {"base": logits}), [row]).give(0, row)
    assert (row.finished().finish_reason, row.finished().trace) == ("nothing", [])


def test_stacked_rows_keep_the_order_of_their_members():
    """A trace lists the members in this order; a set's differs from process to process."""
    roles = ["base", "expert", "antiexpert", "code_expert", "math_expert", "antiexpert2"]
    rows = [Pass(torch.zeros(3), {role: torch.zeros(3) for role in roles}) for _ in range(2)]
    assert list(Pass.stack(rows).members) == roles
    fewer = Pass(torch.zeros(3), {role: torch.zeros(3) for role in roles if role != "expert"})
    assert list(Pass.stack([rows[0], fewer]).members) == [r for r in roles if r != "expert"]
