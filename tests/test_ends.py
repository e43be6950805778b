"""Tokens at the ends: what a tokenizer adds after a prompt, and end tokens that the base lacks.

Each test that names 538a493 fails on it.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import proxytune
from proxytune.errors import UserError
from proxytune.harness.model import ProxyTuneLM
from proxytune.loading.ends import end_ids, shared_end
from proxytune.loading.prompting import PromptFormat, encode, prompt_ids, render
from proxytune.proxy import SharedEnd
from proxytune.records import Prompt
from proxytune.training.data import IGNORE, tokenize
from tasks.judge import YesNoJudge

POCKET = Path(__file__).parents[1] / "pocket" / "models"
Q = "Question: Kim has 8 boxes of 9 drums and gets 3 more. How many drums does Kim have?\nAnswer:"


def adding(template: str, **names: str):
    """A tokenizer with a post-processor that adds tokens as `template` says."""
    tokenizer = tiny_tokenizer()
    words = {word for word in template.split() if word not in ("$A", "$A:0")}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(words)} | names)
    ids = [(word, tokenizer.convert_tokens_to_ids(word)) for word in sorted(words)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "first", "named"),
    [
        ("<s> $A </s>", ["<s>"], "</s>"),
        ("$A </s>", [], "</s>"),
        ("[CLS] $A [SEP]", ["[CLS]"], "[SEP]"),
        ("<s> $A </s> [SEP]", ["<s>"], "</s> [SEP]"),
        ("<s> $A", ["<s>"], None),
        ("$A", [], None),
    ],
)
def test_what_a_tokenizer_adds_at_the_end_is_cut(template, first, named, caplog):
    """Fails on 538a493: the prompts ended in these tokens."""
    tokenizer = adding(template)
    plain = tokenizer("The answer is", add_special_tokens=False)["input_ids"]
    want = [*tokenizer.convert_tokens_to_ids(first), *plain]
    assert encode(render(Prompt("The answer is", ""), PromptFormat(), tokenizer), tokenizer) == want
    for text in ("The answer is", "add(1)"):
        prompt_ids(text, tokenizer)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (named is not None)  # once for each tokenizer
    assert not named or f"adds {named} at the end of a prompt" in lines[0]


def test_an_end_token_that_the_prompt_itself_writes_stays():
    tokenizer = adding("<s> $A </s>")
    assert prompt_ids("add</s>", tokenizer)[-1] == 2
    assert prompt_ids("add</s>", tokenizer) == [1, *tokenizer("add")["input_ids"][1:-1], 2]
    assert prompt_ids("", tokenizer) == [1]
    assert prompt_ids("add</s>", tiny_tokenizer())[-1] == 2


def test_every_way_to_ask_cuts_it():
    """Fails on 538a493 in each of these ways."""
    odd, plain = adding("<s> $A </s>"), adding("<s> $A")
    text, more = "The capital of France is", " Paris. The answer"
    models = [tiny_model("llama", seed) for seed in (1, 2, 3)]
    want = proxytune.load(*models, tokenizer=plain)
    got = proxytune.load(*models, tokenizer=odd)
    assert got.encode(text) == want.encode(text)
    assert got.encode(text)["expert"][-1] != 2
    settings = {"max_new_tokens": 8}
    assert got.generate([text], **settings) == want.generate([text], **settings)
    mine, theirs = ProxyTuneLM(generator=got), ProxyTuneLM(generator=want)
    assert mine.tok_encode(text) == theirs.tok_encode(text)
    assert mine.tok_encode(text, add_special_tokens=True) == mine.tok_encode(text)
    assert mine._encode_pair(text, more) == theirs._encode_pair(text, more)
    row = {"prompt": text, "completion": more}
    assert tokenize([row], odd, 99).examples == tokenize([row], plain, 99).examples
    judge = YesNoJudge(id="none")
    assert judge._encode(text, odd, None) == judge._encode(text, plain, None)


def test_training_data_ends_in_one_end_token():
    """Fails on 538a493: the prompt ended in </s>, and so did the answer, twice."""
    data = tokenize([{"prompt": "Question:", "completion": " Paris."}], adding("<s> $A </s>"), 99)
    ids, labels = data.examples[0]["input_ids"], data.examples[0]["labels"]
    assert data.resplit == 0
    assert ids.count(2) == 1
    assert ids[-1] == labels[-1] == 2
    assert labels[: labels.index(ids[-2])].count(IGNORE) >= 1


# -- an end token that the base lacks --------------------


@pytest.fixture(scope="module")
def own_end(tmp_path_factory):
    """The pocket expert, taught to end its text by a token of its own: <|im_end|>, id 1506."""
    folder = tmp_path_factory.mktemp("own_end")
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "expert")
    model = AutoModelForCausalLM.from_pretrained(POCKET / "expert", dtype=torch.float32)
    old = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    new = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.resize_token_embeddings(new + 1, mean_resizing=False)
    rows = model.get_input_embeddings().weight.detach().clone()
    head = torch.nn.Linear(rows.shape[1], new + 1, bias=False)
    with torch.no_grad():
        rows[new] = rows[old]
        model.get_input_embeddings().weight.copy_(rows)
        head.weight.copy_(rows)
        head.weight[old] = 0
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    model.config.eos_token_id = model.generation_config.eos_token_id = new
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pocket(expert: Path, **more):
    names = str(POCKET / "base"), str(expert), str(POCKET / "antiexpert")
    return proxytune.load(*names, dtype="float32", **more)


@pytest.mark.slow
def test_an_end_token_of_the_expert_ends_the_proxy(own_end, caplog):
    """Fails on 538a493: the proxy never ended."""
    want = pocket(POCKET / "expert")
    got = pocket(own_end)
    assert got.system.end == SharedEnd(2, {"expert": (1506,)}, 1506)
    (line,) = [r.getMessage() for r in caplog.records if "ends its text" in r.getMessage()]
    assert "the expert ends its text with <|im_end|> (1506)" in line
    assert "the end token </s> (2) of the base" in line
    prompts = [Q, "Question: What is the food of Zepla?\nAnswer:"]
    answers = want.generate(prompts, max_new_tokens=60)
    assert answers[0].text.endswith("#### 75")
    for speculative in (False, 1, 3, "auto"):
        for batch_size in (1, 2):
            settings = {"speculative": speculative, "batch_size": batch_size}
            assert got.generate(prompts, max_new_tokens=60, **settings) == answers
    sampled = {"temperature": 1.0, "top_p": 0.9, "n": 2, "max_new_tokens": 20}
    assert got.generate(prompts, **sampled) == want.generate(prompts, **sampled)
    ids = want.encode(Q)["base"]
    torch.testing.assert_close(got.logits(ids), want.logits(ids))
    pairs = [(ids, [*answers[0].token_ids, 2])]
    assert got.loglikelihood(pairs)[0][0] == pytest.approx(want.loglikelihood(pairs)[0][0])
    assert got.loglikelihood(pairs)[0][1]


def test_equal_base_and_antiexpert_leave_an_expert_with_two_ends():
    """The proxy's probability of ending is that of both end tokens together."""
    base, expert = tiny_model("llama", 1), tiny_model("llama", 2, vocab=304)
    expert.generation_config.eos_token_id = [2, 300, 303]
    generator = proxytune.load(base, expert, base, tokenizer=tiny_tokenizer())
    assert generator.system.end == SharedEnd(2, {"expert": (2, 300, 303)}, 300)
    ids = [1, 40, 41, 42]
    with torch.no_grad():
        probs = expert(torch.tensor([ids])).logits[0].double().exp()
    probs[:, 2] += probs[:, 300] + probs[:, 303]
    want = (probs[:, :300] / probs[:, :300].sum(-1, keepdim=True)).log().float()
    torch.testing.assert_close(generator.logits(ids).log_softmax(-1), want, atol=1e-4, rtol=1e-4)


def test_where_the_ends_are():
    tokenizer = tiny_tokenizer()
    sizes = {"base": 300, "expert": 310, "antiexpert": 310}

    def found(**ends):
        return shared_end({role: set(ids) for role, ids in ends.items()}, sizes, tokenizer, 300)

    assert found(base=[2], expert=[2], antiexpert=[2]) is None
    assert found(base=[2], expert=[2, 315], antiexpert=[2]) is None  # beyond the expert's own
    assert found(base=[5, 2], expert=[301], antiexpert=[2, 302]) == SharedEnd(
        2, {"expert": (301,), "antiexpert": (2, 302)}, 300
    )
    tokenizer.eos_token = None
    assert found(base=[7, 5], expert=[301], antiexpert=[5]) == SharedEnd(5, {"expert": (301,)}, 300)
    sizes["base"] = 320  # a base that has more tokens than the pair
    sizes["expert"] = 300
    assert found(base=[310], expert=[4], antiexpert=[4]) == SharedEnd(4, {"base": (310,)}, 300)
    with pytest.raises(UserError, match=r"the base ends its text with token 310.*eos_token"):
        found(base=[310], expert=[], antiexpert=[])


@pytest.mark.parametrize("given", [None, -1, [], [None], [-1]])
def test_no_end_token_in_a_configuration(given):
    assert end_ids(None, SimpleNamespace(eos_token_id=given)) == frozenset()


def test_a_prompt_of_the_expert_may_hold_its_own_tokens(own_end):
    """A chat template writes <|im_end|> after the user's turn; 538a493 refused the prompt."""
    generator = pocket(own_end)
    ids = generator.encode(Q)["base"]
    prompt = {"base": ids, "expert": [*ids[:-1], 1506, ids[-1]], "antiexpert": ids}
    assert generator.generate([prompt], max_new_tokens=4)[0].token_ids
    with pytest.raises(UserError, match="token id 1506 in the prompt of the base"):
        generator.encode([1, 1506])
    with pytest.raises(UserError, match="token id 2060 in the prompt of the expert"):
        generator.encode(prompt | {"expert": [1, 2060]})


def test_a_draft_model_that_lacks_the_end_token_is_refused(own_end):
    with pytest.raises(UserError, match="ends its text with token 1506, which the draft model"):
        proxytune.load(str(own_end), draft=str(POCKET / "antiexpert"), dtype="float32")
