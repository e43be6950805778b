import json

import pytest

from proxytune.engine.text import TokenTexts
from proxytune.files import write_jsonl
from proxytune.records import Completion, Metric
from proxytune.results import analysis


def text(*steps):
    """(token, p_proxy, p_base[, the base's favourite]) -> what the analyses read."""
    return analysis.moves(trace(*steps))


def trace(*steps):
    return [
        {
            "id": token,
            "p": {"system": proxy, "base": base, "expert": 0.5, "antiexpert": 0.5},
            "top": {"base": [[best[0] if best else token, 0.9]]},
        }
        for token, proxy, base, *best in steps
    ]


# line (tokens divided by |) -> left-hand and right-hand sides
EQUATIONS = {
    "5|+|3|=|8": [("5+3", "8")],
    "so| 5| *| 3| =| 1|5| apples": [("5*3", "15")],
    "▁|5|▁+|▁|3|▁=|▁|8": [("5+3", "8")],  # Llama-2's tokens
    "$|1|,|2|0|0| /| 4| =| $|3|0|0|.": [("$1,200/4", "$300")],
    "€|5| ×| 2| =| €|1|0": [("€5×2", "€10")],
    "7| −| 2| =| 5": [("2", "5")],  # a minus sign that is not in the paper's list ends the run
    "7| -| 2| =| 5": [("7-2", "5")],
    "x| =| 5": [],  # nothing on the left
    "5| =| x": [],
    "$| =| 5": [],  # a side without a digit
    "5| ==| 5": [],
    "5| >=| 3": [],
    "1| +| 1| =| 2| =| 2": [("1+1", "22")],  # a chain: everything behind the first sign
    "1|+|1|=|2|\n|3|+|3|=|6": [("1+1", "2"), ("3+3", "6")],
    "1|+|1|=|\n|2": [],  # a line break ends the run
    "1|+|1|=|2| and| 3|+|3|=|6": [("1+1", "2"), ("3+3", "6")],
    "(|2|+|3|)|=|5": [],  # a bracket is no operand
    "2| apples| +| 3| =| 5": [("+3", "5")],
    "=|5": [],
    "5|=": [],
    "": [],
    "12|00|=|1|200|dollars": [("1200", "1200")],
}


@pytest.mark.parametrize("line", EQUATIONS)
def test_equations_of_tricky_lines(line):
    tokens = line.split("|")
    found = [
        tuple("".join(tokens[i] for i in side).replace(" ", "").replace("▁", "") for side in sides)
        for sides in analysis.equation_sides(tokens)
    ]
    assert found == EQUATIONS[line]


def test_spaces_and_the_sign_itself_do_not_count_as_tokens():
    ((left, right),) = analysis.equation_sides(["▁", "5", "▁+", "▁", "3", "▁=", "▁", "8"])
    assert (left, right) == ([1, 2, 4], [7])


def test_welchs_test_on_sides_with_known_means():
    words = {1: "1", 2: "+", 3: "=", 4: "2", 5: "so"}
    # left: 0.4, 0.2, 0.3 and right: 0.1; twice, the second a little higher
    first = text(
        (5, 0.9, 0.1), (1, 0.5, 0.1), (2, 0.5, 0.3), (1, 0.6, 0.3), (3, 1, 0), (4, 0.3, 0.2)
    )
    second = text((1, 0.6, 0.1), (2, 0.6, 0.3), (1, 0.6, 0.2), (3, 1, 0), (4, 0.4, 0.1))
    test = analysis.compare_sides([first, second], words.__getitem__)
    assert (test.left_tokens, test.right_tokens) == (6, 2)
    assert test.left_mean == pytest.approx((0.4 + 0.2 + 0.3 + 0.5 + 0.3 + 0.4) / 6)
    assert test.right_mean == pytest.approx(0.2)
    # t = (m1 - m2) / sqrt(s1^2 / n1 + s2^2 / n2), by hand
    assert test.t == pytest.approx((0.35 - 0.2) / ((0.011 / 6) + (0.02 / 2)) ** 0.5)
    assert 0.2 < test.p_value < 0.6


def test_no_equations_give_no_test():
    test = analysis.compare_sides([], str)
    assert test.left_tokens == 0 and test.p_value != test.p_value


def test_the_most_promoted_types_and_their_commonest_4_gram():
    words = {1: " Here", 2: " is", 3: " the", 4: " answer", 5: " key", 6: " rare"}
    common = [text((1, 0.9, 0.1), (2, 0.5, 0.4), (3, 0.5, 0.4), (4, 0.5, 0.4))] * 3
    other = [text((1, 0.7, 0.1), (2, 0.5, 0.4), (3, 0.5, 0.4), (5, 0.5, 0.4), (6, 1.0, 0.0))]
    found = analysis.most_promoted([*common, *other], words.__getitem__, min_count=3, top=2)
    assert [p.token for p in found] == ["Here", "is"]  # " rare" came once only
    assert found[0].mean_delta == pytest.approx((3 * 0.8 + 0.6) / 4)
    assert (found[0].count, found[0].ngram, found[0].ngram_count) == (4, "Here is the answer", 3)


def test_a_tie_does_not_depend_on_the_order_in_which_completions_ended():
    one = text((1, 0.9, 0.1), (2, 0.5, 0.5), (3, 0.5, 0.5), (4, 0.9, 0.1))
    other = text((1, 0.9, 0.1), (3, 0.5, 0.5), (2, 0.5, 0.5), (4, 0.9, 0.1))
    words = dict(enumerate("_abcd"))
    found = [
        analysis.most_promoted(each, words.__getitem__, min_count=1)
        for each in ([one, other], [other, one])
    ]
    assert found[0] == found[1]


def test_a_type_in_texts_shorter_than_four_tokens_has_no_4_gram():
    (found,) = analysis.most_promoted([text((1, 0.9, 0.1))], {1: "a"}.__getitem__, 1)
    assert found.ngram_count == 0


def test_white_space_has_a_name_in_the_table():
    words = {1: "\n", 2: " ", 3: " a"}
    one = text((3, 0.9, 0.1), (1, 0.8, 0.1), (2, 0.7, 0.1), (3, 0.9, 0.1))
    found = analysis.most_promoted([one], words.__getitem__, min_count=1)
    assert [p.token for p in found] == ["a", "↵", "␣"]
    assert found[0].ngram == "a↵  a"


def test_changed_tokens_overall_and_by_position():
    texts = [
        text((1, 1, 0, 9), (2, 1, 1), (3, 1, 1, 9)),
        text((1, 1, 0, 9), (2, 1, 1)),
        text((1, 1, 1)),
    ]
    assert analysis.changed_share(texts) == pytest.approx(3 / 6)
    table = analysis.changed_by_position(texts, positions=8)
    assert table.position.tolist() == [1, 2, 3]
    assert table.tokens.tolist() == [3, 2, 1]
    assert table.share.tolist() == pytest.approx([2 / 3, 0, 1])
    assert analysis.changed_share([]) != analysis.changed_share([])


def test_traces_are_read_from_completions(tmp_path):
    one = trace((1, 0.9, 0.1))
    write_jsonl(
        tmp_path / "completions.jsonl",
        [
            Completion("a", 0, "", "", [1], "eos", extra={"trace": one}),
            Completion("a", 1, "", "", [1], "eos", extra={"trace": one}),
            Completion("b", 0, "", "", [1], "eos"),
        ],
    )
    assert list(analysis.read_traces(tmp_path)) == [("a", one), ("a", one)]
    assert list(analysis.read_traces(tmp_path, sample=0)) == [("a", one)]
    (found,) = analysis.read_moves(tmp_path)
    assert found.ids.tolist() == [1] and found.rises.tolist() == pytest.approx([0.8])


def test_an_alpha_sweep_is_gathered_from_its_runs(tmp_path):
    for alpha in (1.0, 0.2):
        folder = tmp_path / f"a{alpha}"
        metrics = [
            Metric("t", "proxy", "true", 0.5 + alpha / 10, 10, 10, ci_low=0.4, ci_high=0.7),
            Metric("t", "base", "true", 0.1, 10, 10),
            Metric("other", "proxy", "acc", 0.1, 10, 10),
        ]
        write_jsonl(folder / "metrics.jsonl", metrics)
        config = {"name": "llama13b_chat", "alpha": alpha}
        (folder / "run.json").write_text(json.dumps({"config": config}))
    (tmp_path / "unfinished").mkdir()
    table = analysis.alpha_sweep(tmp_path.iterdir(), task="t")
    assert table.alpha.tolist() == [0.2, 1.0]
    assert table.value.tolist() == pytest.approx([0.52, 0.6])
    assert analysis.alpha_sweep([], task="t").empty


def test_pieces_keep_the_space_in_front(tmp_path):
    import report_folder
    from transformers import AutoTokenizer

    report_folder.tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    piece = TokenTexts(tokenizer).text
    ids = tokenizer.encode("Here is the answer", add_special_tokens=False)
    assert [piece(i) for i in ids] == [" Here", " is", " the", " answer"]


def test_a_tokenizer_that_is_not_here_gives_no_pieces(tmp_path):
    member = {"id": str(tmp_path / "nowhere"), "revision": None}
    (tmp_path / "run.json").write_text(json.dumps({"config": {"triple": {"base": member}}}))
    assert analysis.load_pieces(tmp_path) is None
